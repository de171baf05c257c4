"""The public losses: what a user reads and calls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hsd_kernels import reference
from hsd_kernels.arguments import check
from hsd_kernels.ops import STATISTICS, FusedLoss
from hsd_kernels.pipeline import Wanted, make_schedule
from hsd_kernels.plan import Plan
from hsd_kernels.problem import Problem
from hsd_kernels.token_losses import Divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Backend = Literal["auto", "triton", "cpu", "reference"]


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Detached per-token numbers in nats, in the leading shape of the inputs.

    fp32 (fp64 for fp64 inputs). Rows that were not computed (weight 0) are NaN; a field whose
    inputs were not given is None.

    Attributes:
        kl: the divergence asked for, before weights and cap.
        ref_kl: KL(student || reference).
        logprob, teacher_logprob: of the target.
        entropy, teacher_entropy: of the whole vocabulary.
        lse, teacher_lse: logsumexp of the logits.
        top1_agree: 1 where both sides share their most likely token, else 0.
        gradient_mass: L1 norm of the token's logit gradient; None where none was formed.
        dropped_mass: the part of it that a sparse backward dropped: 0, all of it is kept.
        computed: bool, whether the row entered the computation.
    """

    kl: Tensor | None
    ref_kl: Tensor | None
    logprob: Tensor | None
    teacher_logprob: Tensor | None
    entropy: Tensor
    teacher_entropy: Tensor | None
    lse: Tensor
    teacher_lse: Tensor | None
    top1_agree: Tensor | None
    gradient_mass: Tensor | None
    dropped_mass: Tensor | None
    computed: Tensor


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What `fused_hsd_loss` returns: the differentiable loss (), statistics, and what ran."""

    loss: Tensor
    stats: TokenStatistics
    plan: Plan


def fused_hsd_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_coef: float = 0.0,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    pg_weights: Tensor | None = None,
    ref_weights: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    jsd_convention: Literal["gkd", "interior", "scaled"] = "gkd",
    kl_coef: float = 1.0,
    token_kl_cap: float | None = None,
    advantages: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_range: tuple[float, float] = (0.2, 0.2),
    pg_coef: float = 1.0,
    entropy_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    kl_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    precision: Literal["auto", "fp32_logits", "difference", "bf16_logits"] = "auto",
    sparse_tolerance: float | None = None,
    sparse_max_columns: int | None = None,
    top_k: int = 0,
    weight_grad_out: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: Backend = "auto",
) -> LossOutput:
    """Hindsight self-distillation loss from hidden states, without N x V logits.

    The sum over tokens of

        token_weights * (kl_coef * kl_weights * KL + ref_coef * ref_weights * KL(p || r)
                         + pg_coef * pg_weights * pg - entropy_coef * H)

    with p, q, r the softmaxes of student, teacher and reference over the vocabulary, logits
    softcap * tanh(logit_scale * (x W^T + bias) / softcap) / temperature, all in nats
    (arXiv 2606.15576, equations 10 and 13: KL is forward, teacher first). Gradients go to
    `student_hidden`, `weight` and `bias`; they are formed during forward, in chunks.

    Args:
        student_hidden: (..., D) fp32, bf16, fp16 or fp64.
        teacher_hidden: (..., Dt), detached; None where no term needs a teacher.
        weight: (V, D) output head, a plain unsharded tensor of the same dtype.
        bias: (V,).
        teacher_weight, teacher_bias: the teacher's own head (Vt >= vocab_size); default: the
            student's, detached.
        ref_hidden, ref_weight, ref_bias: the reference's, likewise. With ref_coef 0 its KL is
            computed and reported, with no share in the loss.
        targets: (...,) int64 sampled tokens; needed for log-probs and the policy gradient.
        token_weights: (...,) default 1/N. A row of weight 0 enters no GEMM.
        kl_weights, pg_weights, ref_weights: (...,) further factors of one term; default 1.
        divergence: forward_kl KL(q||p), reverse_kl KL(p||q), or jsd, the generalised
            Jensen-Shannon divergence b KL(q||m) + (1-b) KL(p||m), m = b q + (1-b) p.
        jsd_beta: b, the teacher's share of m.
        jsd_convention: at b = 0 and 1 "gkd" (arXiv 2306.13649) is the forward and reverse KL;
            "interior" refuses them; "scaled" divides by b(1-b), whose limits they are.
        token_kl_cap: nats; a token's KL is multiplied by min(1, cap / KL), held constant.
        advantages: (...,) A of pg = -min(rho A, clip(rho, 1 - low, 1 + high) A).
        old_logprobs: (...,) of rho = exp(logprob - old_logprobs); default: the policy's own.
        temperature: > 0, float or (...,); of log-probs, entropy and policy gradient, and of the
            KLs unless `kl_temperature` (student and reference) or `teacher_temperature` is given.
        vocab_size: columns in use; the head's rows beyond them are padding.
        precision: "fp32_logits" is what "auto" runs; "bf16_logits" rounds them, for comparison.
        max_chunk_bytes: cap of all logits held at a time; default 512 MiB.
        validate: check values (targets, weights) off the CPU too; on it they always are.
        backend: "cpu" (the default for CPU tensors) or "reference" (dense, any device).

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected.
        NotImplementedError: "triton", "difference", sparse_*, top_k, weight_grad_out and
            process_group belong to the interface but not to this version.
    """
    arguments = dict(locals())
    problem = check(arguments)
    lead = student_hidden.shape[:-1]
    if _backend(backend, student_hidden) == "reference":
        loss, statistics = reference.solve(problem)
        return _output(problem, lead, loss, statistics, None, _dense_plan(problem))
    needs = [t is not None and t.requires_grad for t in (student_hidden, weight, bias)]
    wanted = Wanted(*(torch.is_grad_enabled() and need for need in needs))
    schedule = make_schedule(problem, wanted)
    loss, mass, *values = FusedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden, weight, bias, problem, schedule
    )
    statistics = dict(zip(STATISTICS, values, strict=True))
    return _output(problem, lead, loss, statistics, mass, schedule.plan)


def _backend(backend: Backend, student_hidden: Tensor) -> Literal["cpu", "reference"]:
    if backend not in ("auto", "triton", "cpu", "reference"):
        raise ValueError(
            f"backend: found {backend!r}, expected 'auto', 'triton', 'cpu' or 'reference'"
        )
    if backend == "reference":
        return "reference"
    if backend == "triton" or (backend == "auto" and student_hidden.device.type != "cpu"):
        raise NotImplementedError(
            "backend: no GPU kernels in this version; expected 'cpu' for CPU tensors or 'reference'"
        )
    if student_hidden.device.type != "cpu":
        raise ValueError(
            f"backend: found 'cpu' with student_hidden on {student_hidden.device}, "
            "expected CPU tensors"
        )
    return "cpu"


def _dense_plan(problem: Problem) -> Plan:
    rows, vocab_size = len(problem.student), len(problem.weight)
    sides = 1 + (problem.teacher is not None) + (problem.reference is not None)
    return Plan(
        backend="reference",
        precision=problem.precision,
        fused=False,
        rows=rows,
        rows_per_chunk=rows,
        chunks=1,
        gemms=float(sides + 2),
        synchronisations=0,
        workspace_bytes=6 * sides * rows * vocab_size * problem.compute_dtype.itemsize,
        traffic_bytes=12 * sides * rows * vocab_size * problem.compute_dtype.itemsize,
    )


def _output(
    problem: Problem,
    lead: torch.Size,
    loss: Tensor,
    statistics: dict[str, Tensor],
    gradient_mass: Tensor | None,
    plan: Plan,
) -> LossOutput:
    """Gives the statistics their public names, their shape, and NaN where nothing was computed."""
    rows = {name: problem.active for name in ("entropy", "lse")}
    if problem.targets is not None:
        rows["logprob"] = problem.active
    if problem.teacher is not None and problem.loss.divergence is not None:
        kl = problem.loss.divergence_scale * statistics[problem.loss.divergence]
        statistics = {**statistics, "kl": kl}
        of_teacher = ("kl", "teacher_entropy", "teacher_lse", "top1_agree")
        rows |= dict.fromkeys(of_teacher, problem.needs_teacher)
        if problem.targets is not None:
            rows["teacher_logprob"] = problem.needs_teacher
    if problem.reference is not None:
        rows["ref_kl"] = problem.needs_reference
    if gradient_mass is not None:
        dropped = torch.zeros_like(gradient_mass)
        statistics = {**statistics, "gradient_mass": gradient_mass, "dropped_mass": dropped}
        rows |= dict.fromkeys(("gradient_mass", "dropped_mass"), problem.active)
    values: dict[str, Any] = dict.fromkeys(field.name for field in fields(TokenStatistics))
    for name, computed in rows.items():
        values[name] = statistics[name].detach().where(computed, torch.nan).reshape(lead)
    values["computed"] = problem.active.reshape(lead)
    return LossOutput(loss=loss, stats=TokenStatistics(**values), plan=plan)
