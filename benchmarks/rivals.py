"""The other implementations, each called as its documentation says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.work import REF_COEF, Loss, Work


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q, p) of each token, (C,)."""
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def token_lines(
    loss: Loss,
    student: Tensor,  # (C, D)
    head: Tensor,  # (V, D)
    teacher: Tensor,  # (C, D)
    targets: Tensor,  # (C,)
    reference: Tensor | None,  # (C, D)
    reference_head: Tensor | None,  # (V, D)
) -> Tensor:
    """(lines, C), the loss first, as it is mostly written.

    Logits have the operands' dtype, softmaxes are in fp32.
    """
    log_p = (student @ head.T).float().log_softmax(-1)
    if loss == "cross_entropy":
        return functional.nll_loss(log_p, targets, reduction="none")[None]
    with torch.no_grad():
        log_q = (teacher @ head.T).float().log_softmax(-1)
    divergence = _divergence(log_p, log_q)
    if loss == "statistics":
        entropies = [-(x.exp() * x).sum(-1) for x in (log_p, log_q)]
        chosen = [x.gather(-1, targets[:, None]).squeeze(-1) for x in (log_p, log_q)]
        return torch.stack([divergence, *entropies, *chosen])
    if reference is not None and reference_head is not None:
        with torch.no_grad():
            log_r = (reference @ reference_head.T).float().log_softmax(-1)
        divergence = divergence + REF_COEF * _divergence(log_r, log_p)
    return divergence[None]


@functools.cache
def _compiled_lines() -> Callable[..., Tensor]:
    return torch.compile(token_lines, dynamic=False)


def plain(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """Plain torch on all tokens at once."""
    return _in_chunks(token_lines, work, student, head, len(student))


def compiled(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """The same function under torch.compile."""
    return _in_chunks(_compiled_lines(), work, student, head, len(student))


def compiled_chunks(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """The compiled function chunk by chunk, each with its backward, so that one chunk is held."""
    return _in_chunks(_compiled_lines(), work, student, head, chunk)


def _in_chunks(
    function: Callable[..., Tensor], work: Work, student: Tensor, head: Tensor, chunk: int
) -> Tensor:
    count = len(student)
    total = torch.zeros(())
    for start in range(0, count, chunk):
        rows = slice(start, start + chunk)
        reference = None if work.reference is None else work.reference[rows]
        lines = function(
            work.loss,
            student[rows],
            head,
            work.teacher[rows],
            work.targets[rows],
            reference,
            work.reference_head,
        )
        loss = lines[0].sum() / count
        if work.differentiated:
            loss.backward()
        total += loss.detach()
    return total


def linear_cross_entropy(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """torch.nn.functional.linear_cross_entropy; soft targets are the teacher's probabilities.

    Its value then holds the teacher's entropy, which is taken off, without a gradient.
    """
    call: Any = getattr(functional, "linear_cross_entropy")  # noqa: B009  # since torch 2.12
    if work.loss == "cross_entropy":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        loss = call(student, head, work.targets, options=options)
        constant = torch.zeros(())
    else:
        with torch.no_grad():
            log_q = (work.teacher @ head.T).float().log_softmax(-1)
            constant = -(log_q.exp() * log_q).sum(-1).mean()
            soft = log_q.exp().to(student.dtype)
        loss = call(student, head, soft)
    loss.backward()
    return loss.detach().float() - constant


def liger(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """LigerFusedLinearJSDLoss: beta 0 is the forward KL, beta 1 the reverse one; one call each."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(beta: float, states: Tensor, other_head: Tensor) -> Tensor:
        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=True, chunk_size=chunk
        )
        found: Tensor = module(student, head, states, other_head, work.targets)
        return found

    total = loss(0.0, work.teacher, head.detach())
    if work.reference is not None:
        total = total + REF_COEF * loss(1.0, *work.reference_side)
    total.backward()
    return total.detach()


def trl(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """TRL's ChunkedDivergenceFunction with `chunk` vocabulary columns at a time."""
    from trl.kernels import chunked_divergence

    def loss(beta: float, states: Tensor, other_head: Tensor) -> Tensor:
        arguments = (student, head, None, states, other_head, None, beta)
        divergence, _ = chunked_divergence.ChunkedDivergenceFunction.apply(*arguments)
        mean: Tensor = divergence.mean()
        return mean

    before = chunked_divergence.VOCAB_CHUNK_SIZE
    chunked_divergence.VOCAB_CHUNK_SIZE = chunk
    try:
        total = loss(0.0, work.teacher, head.detach())
        if work.reference is not None:
            total = total + REF_COEF * loss(1.0, *work.reference_side)
        if work.differentiated:
            total.backward()
    finally:
        chunked_divergence.VOCAB_CHUNK_SIZE = before
    return total.detach()


def cut_cross_entropy(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """cut-cross-entropy's torch implementation; its kernels need a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cut_cross_entropy import linear_cross_entropy as call
    loss: Tensor = call(student, head, work.targets, impl="torch_compile")
    loss.backward()
    return loss.detach()
