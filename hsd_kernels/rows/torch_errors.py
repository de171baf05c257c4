"""How far a chunk's gradient and its KLs are off by rounding of the stored logits, in PyTorch.

To first order, each stored number being off by what is uniform over one unit in its last place.
With rho = log p/q = d - D, d = z - u and D = log E_q[exp d], a change of z at a fixed d moves both
sides: p and q by their share of themselves, and D by p - q; a change of d moves D by q. So

    p - q             by (p - q) dz + q dd, and by q for all columns together with D
    p (rho - L)       by p (rho - L) dz + p dd
    KL(q || p) = F    by [p - q - q (rho + F)] dz + q (rho + F) dd
    KL(p || q) = L    by [p (rho - L) - (p - q)] dz + (p - q) dd

and the like for jsd and the reference. What is small of second order in rho stays so.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.compiled import fused as compiled
from hsd_kernels.rows.mixture import log_mixture_ratio, mass_difference
from hsd_kernels.rows.torch_gradient import span, with_target
from hsd_kernels.rows.torch_logits import (
    ChunkLogits,
    chunk_logits,
    row_blocks,
    step,
    teacher_ratio,
)
from hsd_kernels.statistics import Coefficients, Row

SMALLEST_KL = 1e-5  # nats: below, a KL need not be known to a share of itself


def _ulp(raw: Tensor, slope: Tensor) -> Tensor:
    """Distance of a stored number to the next, times the slope of the logits by it."""
    bits = raw.to(torch.float32).view(torch.int32) & 0x7F80_0000  # its power of two, 0 for 0
    return bits.view(torch.float32) * (torch.finfo(raw.dtype).eps * slope)


def _relative(of_z: Tensor, of_d: Tensor, z_ulp: Tensor, d_ulp: Tensor, kl: Tensor) -> Tensor:
    """Squared relative error of a KL (C,) from the factors (C, V) of dz and dd."""
    scale = kl.clamp(min=SMALLEST_KL).reciprocal()[:, None]
    # In this order: a column that is nowhere has an enormous ulp, and its factor is 0.
    return (of_z * z_ulp * scale).square() + (of_d * d_ulp * scale).square()


def _of_teacher(
    spec: RowSpec,
    logits: ChunkLogits,
    x: RowInputs,
    rows: Tensor,
    c: Coefficients,
    z_ulp: Tensor,
    d_ulp: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the teacher's side adds to the squares of the gradient's and the KLs' errors."""
    log_p = (logits.z - rows[Row.MAX][:, None]) - rows[Row.LOG_SUM][:, None]
    if spec.forward_kl or spec.jsd:
        _, log_q, rho = teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
    else:
        rho = _reverse_ratio(logits.z, logits.u, logits.z_minus_u, rows, Row.REVERSE_KL)
        log_q = log_p - rho
    p, q, p_minus_q = log_p.exp(), log_q.exp(), mass_difference(log_p, log_q, rho)
    largest = torch.maximum(-rows[Row.LOG_SUM], -rows[Row.TEACHER_LOG_SUM]).exp()[:, None]
    # Through D, a column moves all others: by its share, times the norm of theirs.
    together = (c.forward_kl.abs() + c.jsd.abs()).square() * largest
    own = (c.reverse_kl.abs() + c.jsd.abs()) * p + c.forward_kl.abs() * q
    gradient = together * ((p_minus_q * z_ulp).square() + (q * d_ulp).square())
    gradient = gradient + (own * d_ulp).square()
    value = torch.zeros_like(gradient)
    if spec.forward_kl:
        moved = q * (rho + rows[Row.FORWARD_KL][:, None])
        value = value + _relative(p_minus_q - moved, moved, z_ulp, d_ulp, rows[Row.FORWARD_KL])
    if spec.reverse_kl:
        moved = p * (rho - rows[Row.REVERSE_KL][:, None])
        of_z = moved - p_minus_q
        value = value + _relative(of_z, p_minus_q, z_ulp, d_ulp, rows[Row.REVERSE_KL])
    if spec.jsd:
        m_over_p, m_over_q = log_mixture_ratio(rho, x)
        student_kl = rows[Row.MIXTURE_ANCHOR] + rows[Row.MIXTURE_MEAN]
        teacher_kl = (rows[Row.JSD] - x.jsd_complement * student_kl) / x.jsd_beta
        of_u = x.jsd_beta * q * (-m_over_q - teacher_kl[:, None])
        of_z = x.jsd_complement * p * (-m_over_p - student_kl[:, None]) + of_u
        value = value + _relative(of_z, of_u, z_ulp, d_ulp, rows[Row.JSD])
    return gradient, value


def _reverse_ratio(
    z: Tensor, other: Tensor | None, difference: Tensor | None, rows: Tensor, kl: Row
) -> Tensor:
    """log p - log of the other side, (C, V), from the lines of KL(p || other)."""
    if other is None:
        raise RuntimeError("a row without a second side was asked for its ratio")
    to_other = None if difference is None else -difference
    e = step(z, rows[Row.MAX], other, to_other, rows[Row(kl + 1)])
    return (rows[Row(kl + 2)] + rows[kl])[:, None] - e


def squares(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/d(raw logits), the square of its expected error, and of the KLs', (C, V) each.

    For raw logits of the student and differences, without softcap.
    """
    logits = chunk_logits(spec, x)
    c = Coefficients(*(value[:, None] for value in coefficients))
    slope = x.inverse_temperature[:, None] * x.logit_scale
    z_ulp = _ulp(x.student, slope)
    log_p = (logits.z - rows[Row.MAX][:, None]) - rows[Row.LOG_SUM][:, None]
    p, gradient = log_p.exp(), span(spec, logits, x, rows, c)
    error = ((gradient.abs() + c.entropy.abs() * p) * z_ulp).square()
    value = torch.zeros_like(error)
    if x.teacher is not None and (spec.forward_kl or spec.reverse_kl or spec.jsd):
        d_ulp = _ulp(x.teacher, slope)
        added, value = _of_teacher(spec, logits, x, rows, c, z_ulp, d_ulp)
        error = error + added
    if x.reference is not None:
        d_ulp = _ulp(x.reference, slope)
        rho = _reverse_ratio(logits.z, logits.w, logits.z_minus_w, rows, Row.REF_KL)
        p_minus_r = mass_difference(log_p, log_p - rho, rho)
        of_z = p * (rho - rows[Row.REF_KL][:, None]) - p_minus_r
        value = value + _relative(of_z, p_minus_r, z_ulp, d_ulp, rows[Row.REF_KL])
        error = error + (c.ref_kl * p * d_ulp).square()
    gradient = with_target(gradient, x, c) * slope
    # Uniform over one unit in the last place: its variance is a twelfth of its square.
    return gradient, error * slope.square() / 12, value / 12


def _row_errors(spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients) -> Tensor:
    gradient, error, value = squares(spec, x, rows, coefficients)
    return torch.stack([each.sum(0) for each in (error, gradient.square(), value)])


def _row_gradient_errors(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients
) -> Tensor:
    gradient, error, value = squares(spec, x, rows, coefficients)
    return torch.stack([each.sum(-1) for each in (error, gradient.square(), value)])


def row_gradient_errors(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients, *, fused: bool
) -> Tensor:
    """The sums of `row_errors`, of rows in place of columns, (3, C)."""
    if fused:
        return compiled(_row_gradient_errors, spec)(x, rows, coefficients)
    parts = []
    for b, part in row_blocks(x):
        own = Coefficients(*(c[b] for c in coefficients))
        parts.append(_row_gradient_errors(spec, part, rows[:, b], own))
    return torch.cat(parts, dim=-1)


def _of_log_probs(
    logits: Tensor, ulps: list[Tensor], maximum: Tensor, log_sum: Tensor, entropy: Tensor
) -> Tensor:
    """Squares of what lse and entropy of one side are off by (C, V), in nats."""
    log_p = (logits - maximum[:, None]) - log_sum[:, None]
    p = log_p.exp()
    of_entropy = p * (log_p + entropy[:, None])
    # In this order: see `_relative`.
    return sum(
        ((p * ulp).square() + (of_entropy * ulp).square() for ulp in ulps), torch.zeros_like(p)
    )


def _row_statistics_errors(spec: RowSpec, x: RowInputs, rows: Tensor) -> Tensor:
    zero = torch.zeros_like(rows[0])
    value = squares(spec, x, rows, Coefficients(*[zero] * len(Coefficients._fields)))[2]
    logits = chunk_logits(spec, x)
    slope = x.inverse_temperature[:, None] * x.logit_scale
    ulps = [_ulp(x.student, slope)]
    own = rows[Row.MAX], rows[Row.LOG_SUM], rows[Row.ENTROPY]
    log_probs = _of_log_probs(logits.z, ulps, *own) / 2
    if logits.u is not None and x.teacher is not None:
        ulps.append(_ulp(x.teacher, slope))
        own = rows[Row.TEACHER_MAX], rows[Row.TEACHER_LOG_SUM], rows[Row.TEACHER_ENTROPY]
        log_probs = (log_probs + _of_log_probs(logits.u, ulps, *own) / 2) / 2
    return (value + log_probs / 12).sum(-1)


def row_statistics_errors(spec: RowSpec, x: RowInputs, rows: Tensor, *, fused: bool) -> Tensor:
    """Expected squares of errors per row, (C,), all statistics together.

    Of the KLs relative, as in `row_errors`; to their sum is added the mean of those of lse and
    entropy, the teacher's too, in nats.
    """
    if fused:
        return compiled(_row_statistics_errors, spec)(x, rows)
    parts = [_row_statistics_errors(spec, part, rows[:, b]) for b, part in row_blocks(x)]
    return torch.cat(parts)


def row_errors(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients, *, fused: bool
) -> Tensor:
    """Expected squares of errors per column, summed over rows, (3, V).

    Of dL/d(raw logits), absolute; dL/d(raw logits) itself; of the KLs, relative to each or to
    `SMALLEST_KL`. For raw logits of the student and differences, without softcap.
    """
    # In blocks, compiled too: a sum over rows stores what it sums.
    kernel = compiled(_row_errors, spec) if fused else functools.partial(_row_errors, spec)
    errors = torch.zeros((3, x.student.shape[1]), dtype=rows.dtype, device=rows.device)
    for b, part in row_blocks(x):
        errors += kernel(part, rows[:, b], Coefficients(*(c[b] for c in coefficients)))
    return errors
