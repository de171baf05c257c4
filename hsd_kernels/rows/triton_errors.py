"""How far a chunk is off by rounding of its logits, in Triton: the formulas of `torch_errors`."""

from __future__ import annotations

import triton
import triton.language as tl

from hsd_kernels.rows import triton_math as math
from hsd_kernels.rows.torch_errors import SMALLEST_KL
from hsd_kernels.rows.triton_gradient import span, with_target
from hsd_kernels.rows.triton_tile import COUNTS, load, log_probabilities, step, tile_logits
from hsd_kernels.statistics import Row

_MAX, _LOG_SUM = tl.constexpr(int(Row.MAX)), tl.constexpr(int(Row.LOG_SUM))
_TEACHER_LOG_SUM = tl.constexpr(int(Row.TEACHER_LOG_SUM))
_FORWARD_KL = tl.constexpr(int(Row.FORWARD_KL))
_REVERSE_KL, _REF_KL = tl.constexpr(int(Row.REVERSE_KL)), tl.constexpr(int(Row.REF_KL))
_JSD = tl.constexpr(int(Row.JSD))
_MIXTURE_ANCHOR = tl.constexpr(int(Row.MIXTURE_ANCHOR))
_MIXTURE_MEAN = tl.constexpr(int(Row.MIXTURE_MEAN))
_SMALLEST_KL = tl.constexpr(SMALLEST_KL)


@triton.jit
def _relative(of_z, of_d, z_ulp, d_ulp, kl):
    scale = 1.0 / tl.maximum(kl, _SMALLEST_KL)
    of_z, of_d = of_z * z_ulp * scale, of_d * d_ulp * scale
    return of_z * of_z + of_d * of_d


@triton.jit
def _reverse_ratio(
    statistics, rows, z, other, z_minus_other, FIRST: tl.constexpr, KNOWN: tl.constexpr
):
    """log p - log of the other side; FIRST is the line of KL(p || other)."""
    anchor = tl.load(statistics + (FIRST + 1) * rows)
    e = step(z, tl.load(statistics + _MAX * rows), other, -z_minus_other, anchor, KNOWN)
    return tl.load(statistics + (FIRST + 2) * rows) + tl.load(statistics + FIRST * rows) - e


@triton.jit
def _of_teacher(
    x, statistics, c, row, rows, z, u, z_minus_u, log_p, z_ulp, d_ulp,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    if SPEC.forward_kl or SPEC.jsd:
        _, log_q, rho = log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN.teacher)
    else:
        rho = _reverse_ratio(statistics, rows, z, u, z_minus_u, _REVERSE_KL, KNOWN.teacher)
        log_q = log_p - rho
    p, q = tl.exp(log_p), tl.exp(log_q)
    p_minus_q = math.mass_difference(log_p, log_q, rho)
    student, teacher = (
        tl.load(statistics + _LOG_SUM * rows),
        tl.load(statistics + _TEACHER_LOG_SUM * rows),
    )
    largest = tl.exp(-tl.minimum(student, teacher))
    forward, jsd = tl.abs(tl.load(c.forward_kl + row)), tl.abs(tl.load(c.jsd + row))
    together = (forward + jsd) * (forward + jsd) * largest
    own = (tl.abs(tl.load(c.reverse_kl + row)) + jsd) * p + forward * q
    of_z, of_d = p_minus_q * z_ulp, q * d_ulp
    gradient = together * (of_z * of_z + of_d * of_d) + own * own * (d_ulp * d_ulp)
    value = tl.zeros_like(gradient)
    if SPEC.forward_kl:
        kl = tl.load(statistics + _FORWARD_KL * rows)
        moved = q * (rho + kl)
        value += _relative(p_minus_q - moved, moved, z_ulp, d_ulp, kl)
    if SPEC.reverse_kl:
        kl = tl.load(statistics + _REVERSE_KL * rows)
        value += _relative(p * (rho - kl) - p_minus_q, p_minus_q, z_ulp, d_ulp, kl)
    if SPEC.jsd:
        beta, complement = tl.load(x.jsd_beta), tl.load(x.jsd_complement)
        m_over_p, m_over_q = math.log_mixture_ratio(rho, beta, complement)
        kl = tl.load(statistics + _JSD * rows)
        student_kl = tl.load(statistics + _MIXTURE_ANCHOR * rows)
        student_kl += tl.load(statistics + _MIXTURE_MEAN * rows)
        of_u = beta * q * (-m_over_q - (kl - complement * student_kl) / beta)
        of_z = complement * p * (-m_over_p - student_kl) + of_u
        value += _relative(of_z, of_u, z_ulp, d_ulp, kl)
    return gradient, value


@triton.jit
def _squares(
    x, biases, statistics, c, row, rows, columns, pitch, end,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The three lines of `row_errors` for one tile of one row, in units of the last place."""
    raw, z, u, z_minus_u, w, z_minus_w = tile_logits(
        x, biases, row, columns, pitch, end, SPEC, KNOWN
    )
    terms, log_p = span(x, statistics, c, row, rows, z, u, z_minus_u, w, z_minus_w, SPEC, KNOWN)
    slope = tl.load(x.inverse_temperature + row) * tl.load(x.logit_scale)
    z_ulp, at, p = math.power_below(raw) * slope, row.to(tl.int64) * pitch, tl.exp(log_p)
    moved = (tl.abs(terms) + tl.abs(tl.load(c.entropy + row)) * p) * z_ulp
    error, value = moved * moved, tl.zeros_like(z)
    if SPEC.teacher != "absent" and ((SPEC.forward_kl or SPEC.reverse_kl) or SPEC.jsd):
        d_ulp = math.power_below(load(x.teacher + at, columns, end)) * slope
        added, value = _of_teacher(
            x, statistics, c, row, rows, z, u, z_minus_u, log_p, z_ulp, d_ulp, SPEC, KNOWN
        )
        error += added
    if SPEC.reference != "absent":
        d_ulp = math.power_below(load(x.reference + at, columns, end)) * slope
        rho = _reverse_ratio(statistics, rows, z, w, z_minus_w, _REF_KL, KNOWN.reference)
        p_minus_r = math.mass_difference(log_p, log_p - rho, rho)
        kl = tl.load(statistics + _REF_KL * rows)
        value += _relative(p * (rho - kl) - p_minus_r, p_minus_r, z_ulp, d_ulp, kl)
        moved = tl.load(c.ref_kl + row) * p * d_ulp
        error += moved * moved
    gradient = with_target(terms, x, c, row, columns, SPEC) * slope
    return error * (slope * slope), gradient * gradient, value


@triton.jit(do_not_specialize=COUNTS)
def column_error_kernel(
    x, biases, statistics, c, sums, rows, columns, pitch, epsilon,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums (ceil(rows / BLOCK), 3, columns): `row_errors` over a block of rows."""
    block = tl.program_id(0)
    inside = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    error = tl.zeros((WIDTH,), tl.float32)
    size, value = error, error
    for i in range(BLOCK):
        row = block * BLOCK + i
        if row < rows:
            of_gradient, square, of_value = _squares(
                x, biases, statistics + row, c, row, rows, inside, pitch, columns, SPEC, KNOWN
            )
            error += of_gradient
            size += square
            value += of_value
    # Uniform over one unit in the last place: its variance is a twelfth of its square.
    variance = epsilon * epsilon / 12
    out = sums + block.to(tl.int64) * 3 * columns + inside
    tl.store(out, error * variance, mask=inside < columns)
    tl.store(out + columns, size, mask=inside < columns)
    tl.store(out + 2 * columns, value * variance, mask=inside < columns)
