"""The autograd node: forward forms the gradients, backward scales them by the upstream one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsd_kernels.pipeline import Schedule, solve
from hsd_kernels.problem import Problem

STATISTICS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "ref_kl",
    "logprob",
    "teacher_logprob",
    "entropy",
    "teacher_entropy",
    "lse",
    "teacher_lse",
    "top1_agree",
)
"""The statistics that follow the loss and the gradient mass in `FusedLoss`'s outputs."""


class FusedLoss(torch.autograd.Function):
    """(loss (), gradient_mass (N,) or None, *statistics (N,)) of a problem.

    `student_hidden`, `weight` and `bias` are the caller's own tensors, there to receive gradients;
    `problem` holds the same, flattened and cut to the vocabulary in use.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V', D)
        bias: Tensor | None,  # (V',)
        problem: Problem,
        schedule: Schedule,
    ) -> tuple[Tensor | None, ...]:
        # An outer autocast would round the logits.
        with torch.autocast(student_hidden.device.type, enabled=False):
            solution = solve(problem, schedule)
        ctx.save_for_backward(solution.student_grad, solution.weight_grad, solution.bias_grad)
        ctx.student = (student_hidden.shape, student_hidden.dtype)
        ctx.head_rows = weight.shape[0]
        constants = (
            solution.gradient_mass,
            *(solution.statistics[name] for name in STATISTICS),
        )
        ctx.mark_non_differentiable(*(value for value in constants if value is not None))
        return solution.loss, *constants

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # They would pass for constants, and a second derivative silently lack them.
            raise RuntimeError(
                "fused_hsd_loss: found create_graph=True, but its gradients are formed once and "
                "cannot be differentiated again; expected backend='reference' for that"
            )
        student_grad, weight_grad, bias_grad = ctx.saved_tensors
        shape, dtype = ctx.student

        def head(gradient: Tensor | None) -> Tensor | None:
            """Scaled, with zeros for the rows beyond the vocabulary in use."""
            if gradient is None:
                return None
            missing = gradient.new_zeros((ctx.head_rows - len(gradient), *gradient.shape[1:]))
            scaled = (gradient * upstream).to(dtype)
            return torch.cat([scaled, missing.to(dtype)]) if len(missing) else scaled

        student = None
        if student_grad is not None:
            student = (student_grad * upstream).to(dtype).reshape(shape)
        return student, head(weight_grad), head(bias_grad), None, None
