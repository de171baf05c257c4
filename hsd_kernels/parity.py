"""Losses of other projects, for comparison with them: plain PyTorch, one token's value at a time.

- `top_k_divergence`: divergence over K vocabulary entries and a bucket for the rest (SDPO,
  arXiv 2601.20802), or over the K entries renormalised.
- `full_divergence`: over the whole vocabulary, optionally with the point-wise clip of OPSD
  (arXiv 2601.18734).

Divergence names and jsd conventions are those of `hsd_kernels.fused_hsd_loss`. Both work in chunks
of rows and recompute a chunk's logits in backward: beyond one chunk they hold O(N K) numbers, none
of N x V. They cost 5 GEMMs, 6 over the whole vocabulary or where the student chooses the support,
and take differences of log-softmaxes: at small divergences fp32 keeps few digits of their values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hsd_kernels.arguments import check
from hsd_kernels.checks import check_flag, check_number, check_tensor, check_values
from hsd_kernels.loss import fused_hsd_loss
from hsd_kernels.plan import DEFAULT_CHUNK_BYTES
from hsd_kernels.problem import Problem
from hsd_kernels.reference import dense_logits, divergences
from hsd_kernels.token_losses import Divergence

__all__ = ["full_divergence", "top_k_divergence"]

# Arrays of a chunk's logits that exist at one time, with those of autograd.
_TOP_K_BUFFERS = 7
_FULL_BUFFERS = 17
_LOSS_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(fused_hsd_loss).parameters.items()
}


def top_k_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    support: Literal["student", "teacher"] | Tensor = "student",
    k: int | None = None,
    tail_bucket: bool = True,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    jsd_convention: Literal["gkd", "interior", "scaled"] = "gkd",
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """The divergence of student p and teacher q over K entries of the vocabulary, in nats.

    With S the K entries of the support, both distributions are reduced to

        (p_v for v in S, 1 - sum over S of p)    with the tail bucket: a lower bound of the full
                                                 divergence that grows to it with K
        (p_v / sum over S of p for v in S)       without: what lies outside S does not count

    Gradients go to `student_hidden`, `weight` and `bias`; none goes through the choice of S.

    Args:
        student_hidden: (..., D) fp32, bf16, fp16 or fp64.
        teacher_hidden: (..., Dt), detached.
        weight: (V, D) output head.
        support: whose k most likely entries are S, or S itself, (..., K) int64, distinct ids.
        k: K where `support` names a side.
        tail_bucket: whether the rest is a bucket of its own.
        max_chunk_bytes: cap of what one chunk of rows holds; default 512 MiB.

    The other arguments are those of `hsd_kernels.fused_hsd_loss`; the temperature is of both sides.

    Returns:
        (...,) fp32 (fp64 for fp64 inputs), differentiable.

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected. The
            values of a given support are checked on any device.
    """
    work = _prepare(locals(), buffers=_TOP_K_BUFFERS)
    check_flag("tail_bucket", tail_bucket)
    given = _check_support(support, k, student_hidden, work)

    def chunk(rows: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = work.teacher_logits(rows)
            if given is None:
                chooser = teacher if support == "teacher" else work.student_logits(rows, hidden)
                ids = chooser.topk(k or 0).indices
            else:
                ids = given[rows]
            log_q = _over_support(teacher, ids, tail_bucket=tail_bucket)

        def value(hidden: Tensor) -> Tensor:
            log_p = _over_support(work.student_logits(rows, hidden), ids, tail_bucket=tail_bucket)
            return work.divergence(log_p, log_q)

        return _recomputed(value, hidden)

    return work.over_chunks(chunk).reshape(student_hidden.shape[:-1])


def full_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    pointwise_clip: float | None = None,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    jsd_convention: Literal["gkd", "interior", "scaled"] = "gkd",
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> Tensor:
    """The divergence over the whole vocabulary, its entries clipped one by one, in nats.

    With l_v the share of entry v, q_v (log q_v - log p_v) for the forward KL, the value is
    sum over v of min(l_v, pointwise_clip).

    The clip is off by default, and only here for comparison, because it turns the gradient round
    where it matters. At a divergence token the teacher wants one entry a that the student finds
    unlikely; l_a is above the clip, so the constant that replaces it has no gradient. What is left
    of p - q at entry a is p_a (1 - q_a): positive, so that descent LOWERS the entry that the
    teacher asks for. For q_a = .9, p_a = .01 and a clip of .05 it is +.001 where it should be -.89.
    `token_kl_cap` of `hsd_kernels.fused_hsd_loss` bounds a token's share and keeps its direction.

    Args:
        student_hidden: (..., D) fp32, bf16, fp16 or fp64.
        teacher_hidden: (..., Dt), detached.
        weight: (V, D) output head.
        pointwise_clip: nats, the largest share of one entry; OPSD's released code has .05.
        max_chunk_bytes: cap of what one chunk of rows holds; default 512 MiB.

    The other arguments, the result and the errors are those of `top_k_divergence`.
    """
    work = _prepare(locals(), buffers=_FULL_BUFFERS)
    clip = pointwise_clip
    if clip is not None:
        clip = check_number("pointwise_clip", clip, positive=True)

    def chunk(rows: Tensor, hidden: Tensor) -> Tensor:
        def value(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                log_q = work.teacher_logits(rows).log_softmax(-1)
            log_p = work.student_logits(rows, hidden).log_softmax(-1)
            # As distributions of one entry each: their divergence is the entry's share.
            shares = work.divergence(log_p.unsqueeze(-1), log_q.unsqueeze(-1))
            return (shares if clip is None else shares.clamp(max=clip)).sum(-1)

        return _recomputed(value, hidden)

    return work.over_chunks(chunk).reshape(student_hidden.shape[:-1])


class _Work(NamedTuple):
    """A checked problem, with both heads in the dtype that it is computed in."""

    problem: Problem
    student_head: Tensor  # (V, D), with its graph: gradients of all chunks add up in this dtype
    teacher_head: Tensor  # (V, Dt)
    teacher_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor  # (N, Dt)
    rows_per_chunk: int

    def student_logits(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """(C, V) of hidden states (C, D)."""
        problem = self.problem
        temperature = problem.kl_temperature[rows]
        return dense_logits(problem, hidden, self.student_head, problem.bias, temperature)

    def teacher_logits(self, rows: Tensor) -> Tensor:
        """(C, V)."""
        hidden, temperature = self.teacher_hidden[rows], self.problem.teacher_temperature[rows]
        return dense_logits(self.problem, hidden, self.teacher_head, self.teacher_bias, temperature)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(...,) nats, of log-probabilities (..., V)."""
        settings = self.problem.settings
        found = divergences(log_p, log_q, beta=settings.jsd_beta)
        return settings.loss_scalars[0] * found[settings.divergence]

    def over_chunks(self, chunk: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(N,): what `chunk` gives for the indices (C,) and hidden states (C, D) of its rows."""
        hidden = self.problem.student
        rows = torch.arange(len(hidden), device=hidden.device)
        size = self.rows_per_chunk
        with torch.autocast(hidden.device.type, enabled=False):
            pairs = zip(torch.split(rows, size), torch.split(hidden, size), strict=True)
            return torch.cat([chunk(*pair) for pair in pairs])


def _prepare(arguments: Mapping[str, Any], *, buffers: int) -> _Work:
    """Checks what `fused_hsd_loss` also has, and divides the rows into chunks."""
    shared = {name: arguments[name] for name in _LOSS_DEFAULTS if name in arguments}
    problem = check({**_LOSS_DEFAULTS, **shared})
    teacher = problem.teacher
    if teacher is None:
        raise TypeError("teacher_hidden: found None, expected a tensor")
    settings = problem.settings
    check_values(problem, settings.vocab_size)
    head = problem.weight[: settings.vocab_size].to(problem.compute_dtype)
    row_bytes = buffers * len(head) * head.element_size()
    budget = settings.max_chunk_bytes or DEFAULT_CHUNK_BYTES
    if budget < row_bytes:
        raise ValueError(
            f"max_chunk_bytes: found {budget}, expected at least {row_bytes}, the work of a row"
        )
    return _Work(
        problem=problem,
        student_head=head,
        teacher_head=head.detach() if teacher.shared_head else teacher.weight.to(head.dtype),
        teacher_bias=teacher.bias,
        teacher_hidden=teacher.hidden,
        rows_per_chunk=budget // row_bytes,
    )


def _check_support(
    support: object, k: object, student_hidden: Tensor, work: _Work
) -> Tensor | None:
    """The given ids as (N, K), or None where a side chooses them."""
    vocab_size = len(work.student_head)
    if isinstance(support, str):
        if support not in ("student", "teacher"):
            raise ValueError(
                f"support: found {support!r}, expected 'student', 'teacher' or a tensor"
            )
        if not isinstance(k, int) or isinstance(k, bool) or not 0 < k <= vocab_size:
            raise ValueError(f"k: found {k!r}, expected an int from 1 to {vocab_size}")
        return None
    ids, lead = check_tensor("support", support), student_hidden.shape[:-1]
    if k is not None:
        raise ValueError(f"k: found {k!r}, expected None beside ids in support")
    if ids.dtype != torch.int64:
        raise TypeError(f"support: found {ids.dtype}, expected torch.int64")
    if ids.device != student_hidden.device:
        raise ValueError(f"support: found {ids.device}, expected {student_hidden.device}")
    if ids.dim() == 0 or ids.shape[:-1] != lead or ids.shape[-1] == 0:
        raise ValueError(f"support: found shape {tuple(ids.shape)}, expected {tuple(lead)} + (K,)")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(f"support: found {outside[0].item()}, expected 0 to {vocab_size - 1}")
    ordered = ids.sort(-1).values
    repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if repeated.numel():
        raise ValueError(f"support: found {repeated[0].item()} twice, expected distinct ids")
    return ids.reshape(-1, ids.shape[-1])


def _over_support(logits: Tensor, ids: Tensor, *, tail_bucket: bool) -> Tensor:
    """Log-probabilities of the entries `ids` (C, K), then of the rest: (C, K + 1), sum 1."""
    chosen = logits.gather(-1, ids)
    if not tail_bucket or ids.shape[-1] == logits.shape[-1]:
        return chosen.log_softmax(-1)
    # Summed, and not 1 minus the chosen: a small rest would lose its digits.
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1).log_softmax(-1)


def _recomputed(value: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """value(hidden), which keeps nothing for backward and is computed again there."""
    result: Tensor = checkpoint(value, hidden, use_reentrant=False, preserve_rng_state=False)
    return result
