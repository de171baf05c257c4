"""Elementary functions for the Triton kernels, from operations that the interpreter has too.

Triton's own expm1, log1p and tanh come from a vendor library, which does not run on a CPU. One
source for both means that what the tests check on a CPU is what a GPU runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsd_kernels.rows.mixture import EXPONENT_LIMIT, SERIES_RADIUS

# Two parts of log 2: a multiple by an exponent of the first is exact in fp32.
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.4286068203094172e-6)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LIMIT = tl.constexpr(EXPONENT_LIMIT)
_RADIUS = tl.constexpr(SERIES_RADIUS)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, exactly, for integers -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def expm1(x):
    """exp(x) - 1 to 2 ulp, for x <= 88."""
    x = tl.maximum(x, -40.0)  # -1, to rounding, from -18 on
    # x = n log 2 + r with |r| <= (log 2) / 2; exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1).
    n = tl.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = 1.984595728572458e-4 * r + 1.3941653305664659e-3
    q = q * r + 8.333391509950161e-3
    q = q * r + 4.166634753346443e-2
    q = q * r + 0.1666666567325592
    q = q * r + 0.5
    scale = _power_of_two(n.to(tl.int32))
    return scale * (q * r * r + r) + (scale - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) to 2 ulp, for -1 < x <= 1e38."""
    # 1 + x = 2^k (1 + f) with -1/4 <= f < 1/2; f comes from x itself, not from the rounded 1 + x.
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    k = (bits - 0x3F400000) >> 23
    scale = _power_of_two(-k)
    f = x * scale + (scale - 1.0)
    q = -4.490908980369568e-2 * f + 0.10448277741670609
    q = q * f - 0.13162223994731903
    q = q * f + 0.1448206752538681
    q = q * f - 0.16647768020629883
    q = q * f + 0.19990606606006622
    q = q * f - 0.250000536441803
    q = q * f + 0.3333345353603363
    q = q * f - 0.5
    exponent = k.to(tl.float32)
    # In this order the terms grow, and 1 + x near 1 (k = 0) keeps the digits of f.
    return exponent * _LN2_HIGH + (f + (q * f * f + exponent * _LN2_LOW))


@triton.jit
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    positive = -e / (e + 2.0)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, without cancellation where tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def excess(weight, shift, e):
    """weight (exp(e) - 1 - e) with weight = exp(shift): `partials.excess` in fp32."""
    # sum e^n / (n + 2)!; up to n = 7 it is exact to rounding for |e| < 1/2.
    series = 1 / 362880 * e + 1 / 40320
    series = series * e + 1 / 5040
    series = series * e + 1 / 720
    series = series * e + 1 / 120
    series = series * e + 1 / 24
    series = series * e + 1 / 6
    near = weight * (e * e * (series * e + 0.5))
    far = tl.exp(tl.minimum(shift + e, _LIMIT)) - weight * (1.0 + e)
    return tl.where(tl.abs(e) < _RADIUS, near, far)


@triton.jit
def mass_difference(log_p, log_q, log_ratio):
    """p - q: `mixture.mass_difference`."""
    size = -tl.exp(tl.maximum(log_p, log_q)) * expm1(-tl.abs(log_ratio))
    return tl.where(log_ratio < 0, -size, size)


@triton.jit
def log_mixture_ratio(log_ratio, beta, complement):
    """log m - log p and log m - log q: `mixture.log_mixture_ratio`."""
    student_heavier = beta <= complement
    lighter = tl.minimum(beta, complement)
    to_lighter = tl.where(student_heavier, -log_ratio, log_ratio)
    bounded = tl.minimum(to_lighter, _LIMIT)
    of_heavier = log1p(lighter * expm1(bounded)) + (to_lighter - bounded)
    of_lighter = of_heavier - to_lighter
    of_student = tl.where(student_heavier, of_heavier, of_lighter)
    of_teacher = tl.where(student_heavier, of_lighter, of_heavier)
    return of_student, of_teacher


@triton.jit
def power_below(x):
    """The largest power of two that |x| reaches, 0 for 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """fp32 values in DTYPE, to nearest even, which the interpreter does for bf16 by truncation."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        nearest = bits.to(tl.float32, bitcast=True)  # which bf16 holds exactly
        values = tl.where(values == values, nearest, values)  # a NaN could carry into the sign
    return values.to(DTYPE)
