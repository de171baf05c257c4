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
from hsd_kernels.rows.buffers import PITCH_MULTIPLE
from hsd_kernels.statistics import Row


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


COUNTS = ("rows", "columns", "tiles", "first_column")  # their values select no code

_WIDTH = tl.constexpr(PITCH_MULTIPLE)
_MAX, _LOG_SUM = tl.constexpr(int(Row.MAX)), tl.constexpr(int(Row.LOG_SUM))
_TEACHER_MAX = tl.constexpr(int(Row.TEACHER_MAX))
_TEACHER_LOG_SUM = tl.constexpr(int(Row.TEACHER_LOG_SUM))
_FORWARD_ANCHOR = tl.constexpr(int(Row.FORWARD_ANCHOR))
_FORWARD_LOG_RATIO = tl.constexpr(int(Row.FORWARD_LOG_RATIO))


@triton.jit
def whole(columns):
    """`columns`, rounded up to the width of what may be read and written."""
    return (columns + _WIDTH - 1) // _WIDTH * _WIDTH


@triton.jit
def load(pointer, columns, end):
    """fp32 of a row's columns, 0 from `end` on, where the memory may hold anything."""
    # A mask in units of the width leaves the accesses whole: one at `end` would split them.
    readable = columns < whole(end)
    values = tl.load(pointer + columns, mask=readable, other=0.0).to(tl.float32)
    return tl.where(columns < end, values, 0.0)


@triton.jit
def _raw(pointer, bias, at, columns, end):
    raw = load(pointer + at, columns, end)
    if bias is not None:
        raw += load(bias, columns, end)
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
def tile_logits(x, biases, row, columns, pitch, end, SPEC: tl.constexpr, KNOWN: tl.constexpr):
    """Raw student, z, u, z - u, w, z - w of a tile; z in place of what is absent."""
    TEACHER: tl.constexpr = SPEC.teacher  # Triton 3.6 passes on no string without a name
    REFERENCE: tl.constexpr = SPEC.reference
    at = row.to(tl.int64) * pitch
    inverse_temperature = tl.load(x.inverse_temperature + row)
    raw = _raw(x.student, biases.student, at, columns, end)
    z = _logits(raw, inverse_temperature, x, SPEC)
    u, z_minus_u, w, z_minus_w = z, z, z, z
    if SPEC.teacher != "absent":
        given = _raw(x.teacher, biases.teacher, at, columns, end)
        own_temperature = tl.load(x.teacher_inverse_temperature + row)
        u, z_minus_u = _other(
            given, raw, z, own_temperature, x, SPEC, TEACHER, KNOWN.teacher
        )  # fmt: skip
    if SPEC.reference != "absent":
        given = _raw(x.reference, biases.reference, at, columns, end)
        w, z_minus_w = _other(
            given, raw, z, inverse_temperature, x, SPEC, REFERENCE, KNOWN.reference
        )
    return raw, z, u, z_minus_u, w, z_minus_w


@triton.jit
def step(base, base_max, other, other_minus_base, anchor, KNOWN: tl.constexpr):
    """e = (y - y_k) - (x - x_k): `torch_logits.step`."""
    return other_minus_base - anchor if KNOWN else (other - anchor) - (base - base_max)


@triton.jit
def log_probabilities(statistics, rows, z, u, z_minus_u, KNOWN: tl.constexpr):
    """log p, log q and log p - log q; `statistics` points to the row's place in the first line."""
    teacher_max = tl.load(statistics + _TEACHER_MAX * rows)
    log_p = (z - tl.load(statistics + _MAX * rows)) - tl.load(statistics + _LOG_SUM * rows)
    log_q = (u - teacher_max) - tl.load(statistics + _TEACHER_LOG_SUM * rows)
    anchor = tl.load(statistics + _FORWARD_ANCHOR * rows)
    e = step(u, teacher_max, z, z_minus_u, anchor, KNOWN)
    return log_p, log_q, e - tl.load(statistics + _FORWARD_LOG_RATIO * rows)
