"""Logit gradients in fp16, between the row kernels and the two backward GEMMs.

fp16 has no number below 6e-8, and few digits below 6e-5: the mean over some thousand tokens alone
would put most of a logit gradient there. It is formed times a power of two, by which sums over
chunks, and what the caller has summed before, are multiplied too, and at the end divided again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsd_kernels.accumulation import Solution
from hsd_kernels.problem import Problem
from hsd_kernels.token_losses import HSD_LOSS, LINEAR_LOSS, HsdLoss
from hsd_kernels.workspace import Wanted, operand_dtype

_HEIGHT = 4  # exponent that the largest factor of a statistic's gradient is brought to
_LARGEST_EXPONENT = 60


def gradient_scale(problem: Problem, wanted: Wanted) -> Tensor | None:
    """() a power of two; None where logit gradients are of another dtype."""
    if operand_dtype(problem) != torch.float16 or not any(wanted) or not problem.student.numel():
        return None
    factors = [problem.inputs["token_weights"]]
    if problem.settings.loss == LINEAR_LOSS:
        factors = [v for name, v in problem.inputs.items() if name != "token_weights"]
    largest = torch.stack([factor.abs().amax() for factor in factors]).amax()
    loss = problem.loss
    if problem.settings.loss == HSD_LOSS and isinstance(loss, HsdLoss):
        largest = largest * _largest_coefficient(problem, loss)
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.frexp(largest.where(usable, 1.0)).exponent
    exponent = (_HEIGHT - exponent).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def _largest_coefficient(problem: Problem, loss: HsdLoss) -> float:
    coefficients = [loss.entropy_coef]
    if problem.teacher is not None:
        coefficients.append(loss.divergence_scale * loss.kl_coef)
    if problem.reference is not None:
        coefficients.append(loss.ref_coef)
    if "advantages" in problem.inputs:
        coefficients.append(loss.pg_coef)
    return max(map(abs, coefficients))


def multiply_sums(solution: Solution, scale: Tensor, *, used: int) -> None:
    """Gradients and masses times a power of two; of the head, its first `used` rows."""
    if solution.weight_grad is not None:
        solution.weight_grad[:used].mul_(scale)
    for sums in (solution.student_grad, solution.bias_grad, solution.mass[:2]):
        if sums is not None:
            sums.mul_(scale)
