"""The jsd mixture m = b q + (1 - b) p of a row: what a second reading sums, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec, known_difference
from hsd_kernels.statistics import Row

EXPONENT_LIMIT = 60.0  # exp of it is finite in fp32, times any number of columns
SERIES_RADIUS: Final = 0.5


def remainder(x: Tensor) -> Tensor:
    """exp(x) - 1 - x to a few ulp for |x| < SERIES_RADIUS, by its series."""
    degree = 14 if x.dtype == torch.float64 else 7
    series = torch.full_like(x, 1 / math.factorial(degree + 2))
    for power in range(degree + 1, 1, -1):
        series = series * x + 1 / math.factorial(power)
    return x * x * series


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 to a few ulp: torch.compile turns torch.expm1 into just that subtraction."""
    return torch.where(x.abs() < SERIES_RADIUS, x + remainder(x), x.exp() - 1)


def mass_difference(log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """p - q from log p - log q, without cancellation and without overflow.

    Its exponentials are those of p and q, which readers of a row have at hand.
    """
    p, q = log_p.exp(), log_q.exp()
    near = q * (log_ratio + remainder(log_ratio))
    return torch.where(log_ratio.abs() < SERIES_RADIUS, near, p - q)


def log_mixture_ratio(log_ratio: Tensor, x: RowInputs) -> tuple[Tensor, Tensor]:
    """log m - log p and log m - log q, from log p - log q.

    Formed from the side that weighs more: log m/p = log1p(b expm1(log q/p)) for b <= 1/2.
    Then neither 1 + ... nor the step to the other side cancels, however small the other's weight.
    """
    student_heavier = x.jsd_beta <= x.jsd_complement
    lighter = torch.minimum(x.jsd_beta, x.jsd_complement)
    to_lighter = torch.where(student_heavier, -log_ratio, log_ratio)
    bounded = to_lighter.clamp(max=EXPONENT_LIMIT)
    of_heavier = torch.log1p(lighter * expm1(bounded)) + (to_lighter - bounded)
    of_lighter = of_heavier - to_lighter
    return (
        torch.where(student_heavier, of_heavier, of_lighter),
        torch.where(student_heavier, of_lighter, of_heavier),
    )


def mixture_anchor(spec: RowSpec, rows: Mapping[Row, Tensor], x: RowInputs) -> Tensor:
    """log p/m at the student's most likely token, (C,)."""
    if known_difference(spec, spec.teacher, of_teacher=True):
        e = -rows[Row.REVERSE_ANCHOR] - rows[Row.FORWARD_ANCHOR]
    else:
        e = (rows[Row.MAX] - rows[Row.FORWARD_ANCHOR]) - (
            rows[Row.REVERSE_ANCHOR] - rows[Row.TEACHER_MAX]
        )
    return -log_mixture_ratio(e - rows[Row.FORWARD_LOG_RATIO], x)[0]


def mixture_sums(
    log_p: Tensor, log_q: Tensor, log_ratio: Tensor, anchor: Tensor, x: RowInputs
) -> Tensor:
    """(3, C) of (C, V): KL(p || m), KL(q || m) and E_p[log p/m - anchor], over these columns.

    sum (p - q) = 0 turns each KL into a sum of terms >= 0: nothing of first order cancels.
    """
    p = log_p.exp()
    p_minus_q = mass_difference(log_p, log_q, log_ratio)
    m_over_p, m_over_q = log_mixture_ratio(log_ratio, x)
    student_kl = -(p * m_over_p + x.jsd_beta * p_minus_q).sum(-1)
    teacher_kl = (x.jsd_complement * p_minus_q - log_q.exp() * m_over_q).sum(-1)
    return torch.stack([student_kl, teacher_kl, (p * (-m_over_p - anchor[:, None])).sum(-1)])


def finish_mixture(rows: Tensor, sums: Tensor, x: RowInputs) -> Tensor:
    """Statistics (len(Row), C) with jsd, from parts' sums (S, 3, C) in the order of columns."""
    student_kl, teacher_kl, mean = sums.sum(0)
    rows = rows.clone()
    rows[Row.JSD] = x.jsd_beta * teacher_kl + x.jsd_complement * student_kl
    rows[Row.MIXTURE_MEAN] = mean
    return rows
