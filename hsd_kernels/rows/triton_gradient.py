"""The gradient of a tile in Triton: `row_grad`; and the mass of each column of a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from hsd_kernels.rows import triton_math as math
from hsd_kernels.rows.triton_tile import (
    COUNTS,
    log_probabilities,
    step,
    tile_logits,
    whole,
)
from hsd_kernels.statistics import Row

_MAX, _LOG_SUM = tl.constexpr(int(Row.MAX)), tl.constexpr(int(Row.LOG_SUM))
_LOGIT_MEAN = tl.constexpr(int(Row.LOGIT_MEAN))
_REVERSE_ANCHOR = tl.constexpr(int(Row.REVERSE_ANCHOR))
_REVERSE_MEAN = tl.constexpr(int(Row.REVERSE_MEAN))
_MIXTURE_ANCHOR = tl.constexpr(int(Row.MIXTURE_ANCHOR))
_MIXTURE_MEAN = tl.constexpr(int(Row.MIXTURE_MEAN))
_REFERENCE_ANCHOR = tl.constexpr(int(Row.REFERENCE_ANCHOR))
_REFERENCE_MEAN = tl.constexpr(int(Row.REFERENCE_MEAN))


@triton.jit
def span(
    x, statistics, c, row, rows, z, u, z_minus_u, w, z_minus_w,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """dL/dz of one tile, all terms of `hsd_kernels.statistics` but the one-hot; and log p."""
    z_max = tl.load(statistics + _MAX * rows)
    log_p = (z - z_max) - tl.load(statistics + _LOG_SUM * rows)
    logprob = tl.load(c.logprob + row)
    centred = (z - z_max) - tl.load(statistics + _LOGIT_MEAN * rows)  # log p + H
    along_p = tl.load(c.lse + row) - logprob - tl.load(c.entropy + row) * centred
    if SPEC.reverse_kl:
        anchor = tl.load(statistics + _REVERSE_ANCHOR * rows)
        e = step(z, z_max, u, -z_minus_u, anchor, KNOWN.teacher)
        along_p += tl.load(c.reverse_kl + row) * (tl.load(statistics + _REVERSE_MEAN * rows) - e)
    if SPEC.reference != "absent":
        anchor = tl.load(statistics + _REFERENCE_ANCHOR * rows)
        e = step(z, z_max, w, -z_minus_w, anchor, KNOWN.reference)
        along_p += tl.load(c.ref_kl + row) * (tl.load(statistics + _REFERENCE_MEAN * rows) - e)
    gradient = tl.zeros_like(z)
    if SPEC.forward_kl or SPEC.jsd:
        _, log_q, log_ratio = log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN.teacher)
        if SPEC.forward_kl:
            gradient = tl.load(c.forward_kl + row) * math.mass_difference(log_p, log_q, log_ratio)
        if SPEC.jsd:
            beta, complement = tl.load(x.jsd_beta), tl.load(x.jsd_complement)
            m_over_p, _ = math.log_mixture_ratio(log_ratio, beta, complement)
            v = -m_over_p - tl.load(statistics + _MIXTURE_ANCHOR * rows)
            along_p += tl.load(c.jsd + row) * (v - tl.load(statistics + _MIXTURE_MEAN * rows))
    return gradient + tl.exp(log_p) * along_p, log_p


@triton.jit
def with_target(terms, x, c, row, columns, SPEC: tl.constexpr):
    """The one-hot term beside the others."""
    gradient = terms
    if SPEC.target:
        held = columns == tl.load(x.targets + row)
        gradient += tl.where(held, tl.load(c.logprob + row), 0.0)
    return gradient


@triton.jit
def _gradient(
    x, biases, statistics, c, row, rows, columns, pitch, end,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """dL/d(raw student logits) of one tile: the span of `hsd_kernels.statistics`, summed."""
    raw, z, u, z_minus_u, w, z_minus_w = tile_logits(
        x, biases, row, columns, pitch, end, SPEC, KNOWN
    )
    terms, _ = span(x, statistics, c, row, rows, z, u, z_minus_u, w, z_minus_w, SPEC, KNOWN)
    gradient = with_target(terms, x, c, row, columns, SPEC)
    scale = tl.load(x.logit_scale)
    gradient *= tl.load(x.inverse_temperature + row) * scale
    if SPEC.softcap:
        gradient *= math.tanh_slope(raw * scale / tl.load(x.softcap))
    return tl.where(columns < end, gradient, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    x, biases, statistics, c, out, masses, rows, columns, pitch, out_pitch, tiles,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """out (rows, columns), and its L1 mass before rounding as masses (tiles, rows)."""
    row = tl.program_id(0)
    for i in tl.static_range(RUN):
        tile = tl.program_id(1) * RUN + i
        if tile < tiles:
            inside = tile * TILE + tl.arange(0, TILE)
            gradient = _gradient(
                x, biases, statistics + row, c, row, rows, inside, pitch, columns, SPEC, KNOWN
            )
            writable = inside < whole(columns)
            tl.store(
                out + row.to(tl.int64) * out_pitch + inside,
                math.rounded(gradient, out.dtype.element_ty),
                mask=writable,
            )
            tl.store(masses + tile.to(tl.int64) * rows + row, tl.sum(tl.abs(gradient)))


@triton.jit(do_not_specialize=COUNTS)
def column_mass_kernel(
    gradient, blocks, rows, columns, pitch, BLOCK: tl.constexpr, STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """blocks (ceil(rows / BLOCK), columns): sum |gradient| of each column over a block of rows."""
    block = tl.program_id(0)
    inside = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((STEP, WIDTH), tl.float32)
    for start in range(0, BLOCK, STEP):
        row = block * BLOCK + start + tl.arange(0, STEP)
        readable = (row < rows)[:, None] & (inside < whole(columns))[None, :]
        at = row.to(tl.int64)[:, None] * pitch + inside[None, :]
        total += tl.abs(tl.load(gradient + at, mask=readable, other=0.0).to(tl.float32))
    out = blocks + block.to(tl.int64) * columns + inside
    tl.store(out, tl.sum(total, axis=0), mask=inside < columns)
