"""The row kernels in Triton. A program reads one tile of one row once and keeps it in registers.

Names are those of `hsd_kernels.statistics` and `partials`: z, u, w are the logits of student,
teacher and reference, x the base and y the other of a pair, e = (y - y_k) - (x - x_k). `SPEC` is a
`RowSpec`, `KNOWN` says which differences z - u and z - w are known ones (`rows.known_difference`).

Rows have a pitch that is a multiple of 16 elements, and what lies between the last column and the
next multiple of 16 may be read and written: so every access is 128 bits wide, for odd V too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hsd_kernels.rows import triton_math as math
from hsd_kernels.rows.partials import Partial
from hsd_kernels.statistics import Row

PITCH_MULTIPLE = 16  # elements; also what Triton can know of the divisibility of an integer


@dataclass(frozen=True, kw_only=True)
class Known:
    """Whether the difference to that side is known, see `rows.known_difference`."""

    teacher: bool
    reference: bool


class Biases(NamedTuple):
    """Biases of the heads, (V,) each, to be added to the raw logits that are no difference."""

    student: Tensor | None = None
    teacher: Tensor | None = None
    reference: Tensor | None = None


# Constants of the kernels: lines of parts (`Partial`) and of statistics (`Row`).
_PARTIALS = tl.constexpr(len(Partial))
_Z, _U = tl.constexpr(int(Partial.MAX)), tl.constexpr(int(Partial.TEACHER_MAX))
_W, _W_PAIR = (
    tl.constexpr(int(Partial.REFERENCE_MAX)),
    tl.constexpr(int(Partial.REFERENCE_ANCHOR)),
)
_FORWARD = tl.constexpr(int(Partial.FORWARD_ANCHOR))
_REVERSE = tl.constexpr(int(Partial.REVERSE_ANCHOR))

_MAX, _LOG_SUM = tl.constexpr(int(Row.MAX)), tl.constexpr(int(Row.LOG_SUM))
_LOGIT_MEAN = tl.constexpr(int(Row.LOGIT_MEAN))
_TEACHER_MAX = tl.constexpr(int(Row.TEACHER_MAX))
_TEACHER_LOG_SUM = tl.constexpr(int(Row.TEACHER_LOG_SUM))
_FORWARD_ANCHOR = tl.constexpr(int(Row.FORWARD_ANCHOR))
_FORWARD_LOG_RATIO = tl.constexpr(int(Row.FORWARD_LOG_RATIO))
_REVERSE_ANCHOR = tl.constexpr(int(Row.REVERSE_ANCHOR))
_REVERSE_MEAN = tl.constexpr(int(Row.REVERSE_MEAN))
_MIXTURE_ANCHOR = tl.constexpr(int(Row.MIXTURE_ANCHOR))
_MIXTURE_MEAN = tl.constexpr(int(Row.MIXTURE_MEAN))
_REFERENCE_ANCHOR = tl.constexpr(int(Row.REFERENCE_ANCHOR))
_REFERENCE_MEAN = tl.constexpr(int(Row.REFERENCE_MEAN))

_INFINITY = tl.constexpr(float("inf"))
_NOWHERE = tl.constexpr(-1e30)  # exp of it, and of its sum with any logit, is 0
_WIDTH = tl.constexpr(PITCH_MULTIPLE)
_COUNTS = ("rows", "columns", "tiles", "first_column")  # their values select no code


@triton.jit
def _whole(columns):
    """`columns`, rounded up to the width of what may be read and written."""
    return (columns + _WIDTH - 1) // _WIDTH * _WIDTH


@triton.jit
def _load(pointer, columns, end):
    """fp32 of a row's columns, 0 from `end` on, where the memory may hold anything."""
    # A mask in units of the width leaves the accesses whole: one at `end` would split them.
    readable = columns < _whole(end)
    values = tl.load(pointer + columns, mask=readable, other=0.0).to(tl.float32)
    return tl.where(columns < end, values, 0.0)


@triton.jit
def _raw(pointer, bias, at, columns, end):
    raw = _load(pointer + at, columns, end)
    if bias is not None:
        raw += _load(bias, columns, end)
    return raw


@triton.jit
def _logits(raw, inverse_temperature, x, SPEC: tl.constexpr):
    scaled = raw * tl.load(x.logit_scale)
    if SPEC.softcap:
        softcap = tl.load(x.softcap)
        scaled = softcap * math.tanh(scaled / softcap)
    return scaled * inverse_temperature


@triton.jit
def _other(
    raw, student_raw, z, inverse_temperature, x,
    SPEC: tl.constexpr, SOURCE: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """A second side's logits y, and z - y."""
    if KNOWN:
        difference = raw * (tl.load(x.logit_scale) * inverse_temperature)
        other = z - difference
    else:
        if SOURCE == "difference":
            raw = student_raw - raw
        other = _logits(raw, inverse_temperature, x, SPEC)
        difference = z - other
    return other, difference


@triton.jit
def _tile(x, biases, row, columns, pitch, end, SPEC: tl.constexpr, KNOWN: tl.constexpr):
    """Raw student, z, u, z - u, w, z - w of a tile; z in place of what is absent."""
    at = row.to(tl.int64) * pitch
    inverse_temperature = tl.load(x.inverse_temperature + row)
    raw = _raw(x.student, biases.student, at, columns, end)
    z = _logits(raw, inverse_temperature, x, SPEC)
    u, z_minus_u, w, z_minus_w = z, z, z, z
    if SPEC.teacher != "absent":
        given = _raw(x.teacher, biases.teacher, at, columns, end)
        own_temperature = tl.load(x.teacher_inverse_temperature + row)
        u, z_minus_u = _other(
            given, raw, z, own_temperature, x, SPEC, SPEC.teacher, KNOWN.teacher
        )  # fmt: skip
    if SPEC.reference != "absent":
        given = _raw(x.reference, biases.reference, at, columns, end)
        w, z_minus_w = _other(
            given, raw, z, inverse_temperature, x, SPEC, SPEC.reference, KNOWN.reference
        )
    return raw, z, u, z_minus_u, w, z_minus_w


@triton.jit
def _step(base, base_max, other, other_minus_base, anchor, KNOWN: tl.constexpr):
    """e = (y - y_k) - (x - x_k): `torch_rows._step`."""
    if KNOWN:
        e = other_minus_base - anchor
    else:
        e = (other - anchor) - (base - base_max)
    return e


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
def _store_target(part, rows, logits, columns, target, end):
    """Line TARGET of a side: -inf where this tile does not hold it."""
    hit = (columns == target) & (columns < end)
    tl.store(part + 4 * rows, tl.max(tl.where(hit, logits, -_INFINITY)))


@triton.jit
def _store_pair(
    part, rows, base, base_max, top, shifted, weight, total, other, other_minus_base, columns,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """Lines ANCHOR, MEAN and EXCESS of a pair; the tile is still in registers for the last."""
    anchored = other_minus_base if KNOWN else other
    anchor = tl.sum(tl.where(columns == top, anchored, 0.0))
    e = _step(base, base_max, other, other_minus_base, anchor, KNOWN)
    mean = tl.sum(weight * e) / total
    tl.store(part, anchor)
    tl.store(part + rows, mean)
    tl.store(part + 2 * rows, tl.sum(math.excess(weight, shifted, e - mean)) / total)


@triton.jit
def _store_partials(
    part, x, biases, row, rows, columns, pitch, end, first_column,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """One tile's statistics; `part` points to the row's place in the part's first line."""
    _, z, u, z_minus_u, w, z_minus_w = _tile(x, biases, row, columns, pitch, end, SPEC, KNOWN)
    z_max, z_top, z_shifted, p = _side(z, columns, end)
    z_sum = _store_side(part + _Z * rows, rows, z_max, z_top, z_shifted, p, first_column)
    if SPEC.target:
        target = tl.load(x.targets + row)
        _store_target(part + _Z * rows, rows, z, columns, target, end)
    if SPEC.teacher != "absent":
        u_max, u_top, u_shifted, q = _side(u, columns, end)
        u_sum = _store_side(part + _U * rows, rows, u_max, u_top, u_shifted, q, first_column)
        if SPEC.target:
            _store_target(part + _U * rows, rows, u, columns, target, end)
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
            part + _W_PAIR * rows, rows, z, z_max, z_top, z_shifted, p, z_sum,
            w, -z_minus_w, columns, KNOWN.reference,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
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
            inside = tile * TILE + tl.arange(0, TILE)
            _store_partials(
                part, x, biases, row, rows, inside, pitch, columns, first_column, SPEC, KNOWN
            )


@triton.jit
def _log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN: tl.constexpr):
    """log p, log q and log p - log q; `statistics` points to the row's place in the first line."""
    teacher_max = tl.load(statistics + _TEACHER_MAX * rows)
    log_p = (z - tl.load(statistics + _MAX * rows)) - tl.load(statistics + _LOG_SUM * rows)
    log_q = (u - teacher_max) - tl.load(statistics + _TEACHER_LOG_SUM * rows)
    anchor = tl.load(statistics + _FORWARD_ANCHOR * rows)
    e = _step(u, teacher_max, z, z_minus_u, anchor, KNOWN)
    return log_p, log_q, e - tl.load(statistics + _FORWARD_LOG_RATIO * rows)


@triton.jit
def _store_mixture(
    sums, x, biases, statistics, row, rows, columns, pitch, end,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """The sums of `mixture.mixture_sums` over one tile."""
    _, z, u, z_minus_u, _, _ = _tile(x, biases, row, columns, pitch, end, SPEC, KNOWN)
    log_p, log_q, log_ratio = _log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN.teacher)
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


@triton.jit(do_not_specialize=_COUNTS)
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


@triton.jit
def _gradient(
    x, biases, statistics, c, row, rows, columns, pitch, end,
    SPEC: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """dL/d(raw student logits) of one tile: the span of `hsd_kernels.statistics`, summed."""
    raw, z, u, z_minus_u, w, z_minus_w = _tile(x, biases, row, columns, pitch, end, SPEC, KNOWN)
    z_max = tl.load(statistics + _MAX * rows)
    log_p = (z - z_max) - tl.load(statistics + _LOG_SUM * rows)
    logprob = tl.load(c.logprob + row)
    centred = (z - z_max) - tl.load(statistics + _LOGIT_MEAN * rows)  # log p + H
    along_p = tl.load(c.lse + row) - logprob - tl.load(c.entropy + row) * centred
    if SPEC.reverse_kl:
        anchor = tl.load(statistics + _REVERSE_ANCHOR * rows)
        e = _step(z, z_max, u, -z_minus_u, anchor, KNOWN.teacher)
        along_p += tl.load(c.reverse_kl + row) * (tl.load(statistics + _REVERSE_MEAN * rows) - e)
    if SPEC.reference != "absent":
        anchor = tl.load(statistics + _REFERENCE_ANCHOR * rows)
        e = _step(z, z_max, w, -z_minus_w, anchor, KNOWN.reference)
        along_p += tl.load(c.ref_kl + row) * (tl.load(statistics + _REFERENCE_MEAN * rows) - e)
    gradient = tl.zeros_like(z)
    if SPEC.forward_kl or SPEC.jsd:
        _, log_q, log_ratio = _log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN.teacher)
        if SPEC.forward_kl:
            gradient = tl.load(c.forward_kl + row) * math.mass_difference(log_p, log_q, log_ratio)
        if SPEC.jsd:
            beta, complement = tl.load(x.jsd_beta), tl.load(x.jsd_complement)
            m_over_p, _ = math.log_mixture_ratio(log_ratio, beta, complement)
            v = -m_over_p - tl.load(statistics + _MIXTURE_ANCHOR * rows)
            along_p += tl.load(c.jsd + row) * (v - tl.load(statistics + _MIXTURE_MEAN * rows))
    gradient += tl.exp(log_p) * along_p
    if SPEC.target:
        gradient += tl.where(columns == tl.load(x.targets + row), logprob, 0.0)
    scale = tl.load(x.logit_scale)
    gradient *= tl.load(x.inverse_temperature + row) * scale
    if SPEC.softcap:
        gradient *= math.tanh_slope(raw * scale / tl.load(x.softcap))
    return tl.where(columns < end, gradient, 0.0)


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        rounded = values
    else:  # named: the interpreter would truncate
        rounded = values.to(DTYPE, fp_downcast_rounding="rtne")
    return rounded


@triton.jit(do_not_specialize=_COUNTS)
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
            writable = inside < _whole(columns)
            tl.store(
                out + row.to(tl.int64) * out_pitch + inside,
                _rounded(gradient, out.dtype.element_ty),
                mask=writable,
            )
            tl.store(masses + tile.to(tl.int64) * rows + row, tl.sum(tl.abs(gradient)))


@triton.jit(do_not_specialize=_COUNTS)
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
        readable = (row < rows)[:, None] & (inside < _whole(columns))[None, :]
        at = row.to(tl.int64)[:, None] * pitch + inside[None, :]
        total += tl.abs(tl.load(gradient + at, mask=readable, other=0.0).to(tl.float32))
    out = blocks + block.to(tl.int64) * columns + inside
    tl.store(out, tl.sum(total, axis=0), mask=inside < columns)
