"""Statistics of tiles in Triton: `row_partials`, and the second reading of jsd, `row_mixture`."""

from __future__ import annotations

import triton
import triton.language as tl

from hsd_kernels.rows import triton_math as math
from hsd_kernels.rows.partials import Partial
from hsd_kernels.rows.triton_tile import COUNTS, log_probabilities, step, tile_logits
from hsd_kernels.statistics import Row

# First lines of what lies together in a part: a side, or a pair.
_PARTIALS = tl.constexpr(len(Partial))
_Z, _U = tl.constexpr(int(Partial.MAX)), tl.constexpr(int(Partial.TEACHER_MAX))
_W = tl.constexpr(int(Partial.REFERENCE_MAX))
_FORWARD = tl.constexpr(int(Partial.FORWARD_ANCHOR))
_REVERSE = tl.constexpr(int(Partial.REVERSE_ANCHOR))
_REFERENCE = tl.constexpr(int(Partial.REFERENCE_ANCHOR))
_MIXTURE_ANCHOR = tl.constexpr(int(Row.MIXTURE_ANCHOR))

_INFINITY = tl.constexpr(float("inf"))
_NOWHERE = tl.constexpr(-1e30)  # exp of it, and of its sum with any logit, is 0


@triton.jit
def _side(logits, columns, end):
    """Maximum, its lowest column, and each column's logit and weight relative to it."""
    valid = columns < end
    maximum = tl.max(tl.where(valid, logits, -_INFINITY))
    top = tl.min(tl.where(valid & (logits == maximum), columns, end))
    # Finite, so that 0 times it is 0.
    shifted = tl.where(valid, logits - maximum, _NOWHERE)
    return maximum, top, shifted, tl.exp(shifted)


@triton.jit
def _store_side(part, rows, maximum, top, shifted, weight, first_column):
    """Lines MAX, SUM, MEAN and TOP of a side; returns the sum."""
    total = tl.sum(weight)
    tl.store(part, maximum)
    tl.store(part + rows, total)
    tl.store(part + 2 * rows, tl.sum(weight * shifted) / total)
    tl.store(part + 3 * rows, (first_column + top).to(tl.float32))
    return total


@triton.jit
def _store_target(part, rows, logits, columns, target, held):
    """Line TARGET of a side: -inf where this tile does not hold it."""
    value = tl.full((), -_INFINITY, tl.float32)
    if held:
        value = tl.sum(tl.where(columns == target, logits, 0.0))
    tl.store(part + 4 * rows, value)


@triton.jit
def _store_pair(
    part, rows, base, base_max, top, shifted, weight, total, other, other_minus_base, columns,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """Lines ANCHOR, MEAN and EXCESS of a pair; the tile is still in registers for the last."""
    anchored = other_minus_base if KNOWN else other
    anchor = tl.sum(tl.where(columns == top, anchored, 0.0))
    e = step(base, base_max, other, other_minus_base, anchor, KNOWN)
    mean = tl.sum(weight * e) / total
    tl.store(part, anchor)
    tl.store(part + rows, mean)
    tl.store(part + 2 * rows, tl.sum(math.excess(weight, shifted, e - mean)) / total)


@triton.jit
def _store_partials(
    part, x, biases, row, rows, first, pitch, end, first_column,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile's statistics; `part` points to the row's place in the part's first line."""
    columns = first + tl.arange(0, TILE)
    _, z, u, z_minus_u, w, z_minus_w = tile_logits(x, biases, row, columns, pitch, end, SPEC, KNOWN)
    z_max, z_top, z_shifted, p = _side(z, columns, end)
    z_sum = _store_side(part + _Z * rows, rows, z_max, z_top, z_shifted, p, first_column)
    if SPEC.target:
        target = tl.load(x.targets + row)
        held = (target >= first) & (target < tl.minimum(first + TILE, end))
        _store_target(part + _Z * rows, rows, z, columns, target, held)
    if SPEC.teacher != "absent":
        u_max, u_top, u_shifted, q = _side(u, columns, end)
        u_sum = _store_side(part + _U * rows, rows, u_max, u_top, u_shifted, q, first_column)
        if SPEC.target:
            _store_target(part + _U * rows, rows, u, columns, target, held)
        if SPEC.forward_kl or SPEC.jsd:
            _store_pair(
                part + _FORWARD * rows, rows, u, u_max, u_top, u_shifted, q, u_sum,
                z, z_minus_u, columns, KNOWN.teacher,
            )  # fmt: skip
        if SPEC.reverse_kl or SPEC.jsd:
            _store_pair(
                part + _REVERSE * rows, rows, z, z_max, z_top, z_shifted, p, z_sum,
                u, -z_minus_u, columns, KNOWN.teacher,
            )  # fmt: skip
    if SPEC.reference != "absent":
        w_max, _, _, r = _side(w, columns, end)
        tl.store(part + _W * rows, w_max)
        tl.store(part + (_W + 1) * rows, tl.sum(r))
        _store_pair(
            part + _REFERENCE * rows, rows, z, z_max, z_top, z_shifted, p, z_sum,
            w, -z_minus_w, columns, KNOWN.reference,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def partials_kernel(
    x, biases, parts, rows, columns, pitch, tiles, first_column,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """parts (tiles, len(Partial), rows) of x: a program has `RUN` tiles of one row."""
    row = tl.program_id(0)
    for i in tl.static_range(RUN):
        tile = tl.program_id(1) * RUN + i
        if tile < tiles:
            part = parts + tile.to(tl.int64) * _PARTIALS * rows + row
            _store_partials(
                part, x, biases, row, rows, tile * TILE, pitch, columns, first_column,
                SPEC, KNOWN, TILE,
            )  # fmt: skip


@triton.jit
def _store_mixture(
    sums, x, biases, statistics, row, rows, columns, pitch, end,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The sums of `mixture.mixture_sums` over one tile."""
    _, z, u, z_minus_u, _, _ = tile_logits(x, biases, row, columns, pitch, end, SPEC, KNOWN)
    log_p, log_q, log_ratio = log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN.teacher)
    beta, complement = tl.load(x.jsd_beta), tl.load(x.jsd_complement)
    m_over_p, m_over_q = math.log_mixture_ratio(log_ratio, beta, complement)
    p, p_minus_q = tl.exp(log_p), math.mass_difference(log_p, log_q, log_ratio)
    student_kl = -(p * m_over_p + beta * p_minus_q)
    teacher_kl = complement * p_minus_q - tl.exp(log_q) * m_over_q
    centred = p * (-m_over_p - tl.load(statistics + _MIXTURE_ANCHOR * rows))
    valid = columns < end
    tl.store(sums, tl.sum(tl.where(valid, student_kl, 0.0)))
    tl.store(sums + rows, tl.sum(tl.where(valid, teacher_kl, 0.0)))
    tl.store(sums + 2 * rows, tl.sum(tl.where(valid, centred, 0.0)))


@triton.jit(do_not_specialize=COUNTS)
def mixture_kernel(
    x, biases, statistics, sums, rows, columns, pitch, tiles,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """sums (tiles, 3, rows) of x and of the rows' statistics (len(Row), rows)."""
    row = tl.program_id(0)
    for i in tl.static_range(RUN):
        tile = tl.program_id(1) * RUN + i
        if tile < tiles:
            inside = tile * TILE + tl.arange(0, TILE)
            _store_mixture(
                sums + tile.to(tl.int64) * 3 * rows + row,
                x, biases, statistics + row, row, rows, inside, pitch, columns, SPEC, KNOWN,
            )  # fmt: skip
