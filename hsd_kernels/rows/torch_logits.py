"""The logits that a chunk's raw ones stand for, and differences of them, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec, Source, known_difference
from hsd_kernels.statistics import Row

PLAIN_BLOCK_ELEMENTS = 1 << 21  # of what plain PyTorch works on at a time


def _logits(spec: RowSpec, raw: Tensor, x: RowInputs, inverse_temperature: Tensor) -> Tensor:
    scaled = raw.to(inverse_temperature.dtype) * x.logit_scale
    if spec.softcap:
        scaled = x.softcap * torch.tanh(scaled / x.softcap)
    return scaled * inverse_temperature[:, None]


class ChunkLogits(NamedTuple):
    """A chunk's logits, (C, V) each; a difference only where it is better than a subtraction."""

    z: Tensor
    u: Tensor | None  # the teacher's
    z_minus_u: Tensor | None
    w: Tensor | None  # the reference's
    z_minus_w: Tensor | None


def chunk_logits(spec: RowSpec, x: RowInputs) -> ChunkLogits:
    """The logits that a reading's raw ones stand for."""
    z = _logits(spec, x.student, x, x.inverse_temperature)

    def other(
        source: Source, raw: Tensor | None, inverse_temperature: Tensor, *, of_teacher: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if raw is None:
            return None, None
        if known_difference(spec, source, of_teacher=of_teacher):
            factor = x.logit_scale * x.inverse_temperature[:, None]
            difference = raw.to(factor.dtype) * factor
            return z - difference, difference
        own = x.student - raw if source == "difference" else raw
        return _logits(spec, own, x, inverse_temperature), None

    u, z_minus_u = other(spec.teacher, x.teacher, x.teacher_inverse_temperature, of_teacher=True)
    w, z_minus_w = other(spec.reference, x.reference, x.inverse_temperature, of_teacher=False)
    return ChunkLogits(z, u, z_minus_u, w, z_minus_w)


def step(
    base: Tensor, base_max: Tensor, other: Tensor, difference: Tensor | None, anchor: Tensor
) -> Tensor:
    """e = (y - y_k) - (x - x_k), (C, V), of base x and other y; `difference` is y - x if known.

    Each bracket is exact for the tokens that carry mass, whatever the offset of the logits.
    """
    if difference is not None:
        return difference - anchor[:, None]
    return (other - anchor[:, None]) - (base - base_max[:, None])


def teacher_ratio(
    logits: ChunkLogits, rows: Tensor, log_ratio_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and log p - log q, (C, V) each."""
    z, u, z_minus_u = logits.z, logits.u, logits.z_minus_u
    if u is None:
        raise RuntimeError("a row without a teacher was asked for its divergence")
    log_p = (z - rows[Row.MAX][:, None]) - rows[Row.LOG_SUM][:, None]
    log_q = (u - rows[Row.TEACHER_MAX][:, None]) - rows[Row.TEACHER_LOG_SUM][:, None]
    e = step(u, rows[Row.TEACHER_MAX], z, z_minus_u, rows[Row.FORWARD_ANCHOR])
    return log_p, log_q, e - log_ratio_sum[:, None]


def block_size(x: RowInputs) -> int:
    """Rows that keep the temporaries of plain PyTorch small."""
    return max(1, PLAIN_BLOCK_ELEMENTS // max(x.student.shape[1], 1))


def of_rows(x: RowInputs, rows: slice | Tensor) -> RowInputs:
    """Some rows of a chunk, by a slice or their numbers."""
    parts: list[Any] = [t if t is None or t.dim() == 0 else t[rows] for t in x]
    return RowInputs(*parts)


def row_blocks(x: RowInputs) -> Iterator[tuple[slice, RowInputs]]:
    """A chunk in blocks of `block_size` rows."""
    rows, size = len(x.student), block_size(x)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        yield block, of_rows(x, block)
