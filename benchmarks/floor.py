"""The speed of light: the matrix products of a loss and nothing else, in the operands' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.work import Work


def gemms(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """Logits of every side, dX = G W and dW += G^T X, chunk by chunk; G is whatever is there."""
    return _loop(work, student, head, chunk, backward=work.differentiated)


def forward_gemms(work: Work, student: Tensor, head: Tensor, chunk: int) -> Tensor:
    """The logits alone: what a backward on a few columns is measured against."""
    return _loop(work, student, head, chunk, backward=False)


@torch.no_grad()
def _loop(work: Work, student: Tensor, head: Tensor, chunk: int, *, backward: bool) -> Tensor:
    teacher = None if work.loss == "cross_entropy" else work.teacher
    sides, chunk = 1 + (teacher is not None), min(chunk, len(student))
    logits = head.new_empty((sides * chunk, len(head)))
    third = torch.empty_like(logits[:chunk]) if work.reference is not None else None
    student_grad = torch.empty_like(student) if backward else None
    head_grad = torch.zeros_like(head) if backward and work.trainable else None
    for start in range(0, len(student), chunk):
        own = student[start : start + chunk]
        rows = own if teacher is None else torch.cat([own, teacher[start : start + chunk]])
        torch.mm(rows, head.t(), out=logits[: len(rows)])
        if third is not None:
            states, reference_head = work.reference_side
            torch.mm(states[start : start + chunk], reference_head.t(), out=third[: len(own)])
        gradient = logits[: len(own)]
        if student_grad is not None:
            torch.mm(gradient, head, out=student_grad[start : start + chunk])
        if head_grad is not None:
            head_grad.addmm_(gradient.t(), own)
    return torch.zeros(())
