"""This library's losses as methods of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmarks.work import REF_COEF, Work
from hsd_kernels import fused_hsd_loss, fused_token_loss


def fused(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """The dense loss; `chunk` rows of fp32 logits are the byte budget it is given."""
    return _run(work, student, head, chunk)


def sparse(tolerance: float) -> Callable[[Work, Tensor, Tensor, int], Tensor]:
    """The loss with a backward on the columns that hold all but `tolerance` of the gradient."""

    def run(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
        return _run(work, student, head, chunk, sparse_tolerance=tolerance)

    return run


def fused_statistics(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """KL, log-probs and entropies of both sides; no gradient. Returns the mean KL."""
    out = fused_hsd_loss(
        student,
        work.teacher,
        head,
        targets=work.targets,
        max_chunk_bytes=budget(work, chunk),
    )
    return out.loss.detach()


def budget(work: Work, chunk: int) -> int:
    """Bytes of the fp32 logits of `chunk` rows of all sides."""
    sides = {"with_reference": 3, "cross_entropy": 1}.get(work.loss, 2)
    return chunk * sides * work.shape[2] * 4


def _run(work: Work, student: Tensor, head: Tensor, chunk: int, **options: Any) -> Tensor:
    options["max_chunk_bytes"] = budget(work, chunk)
    if work.loss == "cross_entropy":
        loss = fused_token_loss(
            student, None, head, targets=work.targets, token_loss=_surprise, **options
        ).loss
    else:
        if work.loss == "with_reference":
            states, reference_head = work.reference_side
            options |= {
                "ref_hidden": states,
                "ref_weight": reference_head,
                "ref_coef": REF_COEF,
            }
        loss = fused_hsd_loss(student, work.teacher, head, **options).loss
    loss.backward()
    return loss.detach()


def _surprise(statistics: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    return -statistics["logprob"]
