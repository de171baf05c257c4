"""The row kernels in PyTorch: fused by torch.compile where there is a C++ compiler, else plain.

Both run the same source and give the same result up to rounding. Unfused, every line is a pass over
memory with a temporary of its own; then the rows go through in small blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.rows import CheckedKernels, RowInputs, RowKernels, RowSpec
from hsd_kernels.rows.compiled import fused as compiled
from hsd_kernels.rows.mixture import (
    EXPONENT_LIMIT,
    SERIES_RADIUS,
    finish_mixture,
    mixture_sums,
    remainder,
)
from hsd_kernels.rows.partials import Partial, finish, pairs
from hsd_kernels.rows.torch_errors import row_errors, row_gradient_errors, row_statistics_errors
from hsd_kernels.rows.torch_gradient import masses, row_grad
from hsd_kernels.rows.torch_logits import (
    block_size,
    chunk_logits,
    of_rows,
    row_blocks,
    step,
    teacher_ratio,
)
from hsd_kernels.statistics import Row

_PAIRS: Final = (Partial.FORWARD_ANCHOR, Partial.REVERSE_ANCHOR, Partial.REFERENCE_ANCHOR)
_LARGEST_MEAN: Final = 20.0  # nats
_LARGEST_MOVE: Final = 32.0  # of an excess, beside what is left: more would cost the KL its digits

_LANES: Final = 32  # of a row, column by column in turn; each has a likeliest
_LIKELIEST: Final = 2  # of these, on each side


class _Side(NamedTuple):
    """One side's logits and what the first reading of a row tells of them."""

    logits: Tensor  # (C, V)
    maximum: Tensor  # (C,)
    top: Tensor  # (C, 1) int64
    shifted: Tensor  # (C, V) logits less maximum
    weight: Tensor  # (C, V) exp of it
    total: Tensor  # (C,) sum of it


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """values (C, V) at one column per row (C, 1), as (C,)."""
    return values.gather(-1, columns).squeeze(-1)


def _row_likely(spec: RowSpec, x: RowInputs) -> Tensor:
    logits = chunk_logits(spec, x)
    found = []
    for side in (logits.z, logits.u, logits.w):
        if side is None:
            continue
        lanes = _lanes(side.shape[1])
        # Neighbours in the vocabulary, digits for one, lie in different lanes.
        whole = side[:, : side.shape[1] // lanes * lanes]
        parts = whole.reshape(len(side), -1, lanes)
        maximum = parts.amax(1)
        rows = torch.arange(parts.shape[1], dtype=torch.int32, device=side.device)
        place = torch.where(parts == maximum[:, None], rows[:, None], parts.shape[1] - 1).amin(1)
        found += [maximum, place.to(maximum.dtype)]
    return torch.stack(found)


def _lanes(columns: int) -> int:
    return min(_LANES, columns)


def _lowest(found: Tensor) -> Tensor:
    """The lowest column (...,) int32 of those found (..., V), else the last.

    `argmax` compiles to six times the instructions.
    """
    last = found.shape[-1] - 1
    columns = torch.arange(last + 1, dtype=torch.int32, device=found.device)
    return torch.where(found, columns, last).amin(-1)


def _side(logits: Tensor) -> _Side:
    maximum = logits.amax(-1)
    top = _lowest(logits == maximum[:, None])[:, None].long()
    shifted = logits - maximum[:, None]
    # torch.compile would store an `exp` with many uses, (C, V), but not an `exp2`.
    weight = torch.exp2(shifted * math.log2(math.e))
    return _Side(logits, maximum, top, shifted, weight, weight.sum(-1))


def _row_partials(spec: RowSpec, x: RowInputs, means: Tensor) -> Tensor:
    """The part of whole rows in two readings of them: the maxima, then all sums.

    The second knows no mean of e yet: the anchors are moved by `means` (len(_PAIRS), C), what one
    expects of them, and the excess is moved from there to the mean that is found.
    """
    z, u, z_minus_u, w, z_minus_w = chunk_logits(spec, x)
    lines: dict[Partial, Tensor] = {}

    def store(side: _Side, first: Partial) -> None:
        lines[first], lines[Partial(first + 1)] = side.maximum, side.total
        lines[Partial(first + 2)] = (side.weight * side.shifted).sum(-1) / side.total
        lines[Partial(first + 3)] = side.top.squeeze(-1).to(side.total.dtype)
        if x.targets is not None:
            own = _at(side.logits, x.targets.clamp(min=0)[:, None])
            lines[Partial(first + 4)] = torch.where(x.targets >= 0, own, -torch.inf)

    def pair(base: _Side, other: _Side, difference: Tensor | None, first: Partial) -> None:
        at_top = _at(other.logits if difference is None else difference, base.top)
        anchor = at_top + (expected := means[_PAIRS.index(first)])
        e = step(base.logits, base.maximum, other.logits, difference, anchor)
        height = other.maximum - (anchor if difference is None else base.maximum + anchor)
        of_other = height.clamp(max=EXPONENT_LIMIT).exp()[:, None] * other.weight  # ~ weight exp(e)
        far = of_other - base.weight * (1 + e)
        near = base.weight * remainder(e)
        mean = (base.weight * e).sum(-1).double() / base.total
        beyond = torch.where(e.abs() < SERIES_RADIUS, near, far).sum(-1).double() / base.total
        # E[exp(e - mean)] - 1 = exp(-mean) (E[exp(e) - 1 - e] - (exp(mean) - 1 - mean)), in fp64.
        at_mean = torch.where(mean.abs() < SERIES_RADIUS, remainder(mean), mean.exp() - 1 - mean)
        lines[first], lines[Partial(first + 1)] = at_top, expected + mean
        lines[Partial(first + 2)] = torch.exp(-mean) * (beyond - at_mean)

    student = _side(z)
    store(student, Partial.MAX)
    if u is not None:
        teacher = _side(u)
        store(teacher, Partial.TEACHER_MAX)
        if spec.forward_kl or spec.jsd:
            pair(teacher, student, z_minus_u, Partial.FORWARD_ANCHOR)
        if spec.reverse_kl or spec.jsd:
            u_minus_z = None if z_minus_u is None else -z_minus_u
            pair(student, teacher, u_minus_z, Partial.REVERSE_ANCHOR)
    if w is not None:
        reference = _side(w)
        lines[Partial.REFERENCE_MAX] = reference.maximum
        lines[Partial.REFERENCE_SUM] = reference.total
        w_minus_z = None if z_minus_w is None else -z_minus_w
        pair(student, reference, w_minus_z, Partial.REFERENCE_ANCHOR)
    absent = torch.full_like(student.maximum, torch.nan)
    return torch.stack([lines.get(name, absent).to(absent.dtype) for name in Partial])


def _row_mixture(spec: RowSpec, x: RowInputs, rows: Tensor) -> Tensor:
    logits = chunk_logits(spec, x)
    ratio = teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
    return mixture_sums(*ratio, rows[Row.MIXTURE_ANCHOR], x)


def row_kernels(*, fused: bool) -> RowKernels:
    """These kernels, compiled or plain."""
    return RowKernels(
        partials=functools.partial(row_partials, fused=fused),
        mixture=functools.partial(row_mixture, fused=fused),
        grad=functools.partial(row_grad, fused=fused),
        errors=functools.partial(row_errors, fused=fused),
        checked=CheckedKernels(
            likely=functools.partial(row_likely, fused=fused),
            gradient_errors=functools.partial(row_gradient_errors, fused=fused),
            statistics_errors=functools.partial(row_statistics_errors, fused=fused),
        ),
        masses=masses,
        stats=functools.partial(row_stats, fused=fused),
    )


def row_partials(spec: RowSpec, x: RowInputs, *, first_column: int = 0, fused: bool) -> Tensor:
    """The rows' one part, (1, len(Partial), C); `first_column` is the column of the vocabulary."""
    part = _moved_partials(spec, x, x.inverse_temperature.new_zeros(3, len(x.student)), fused=fused)
    if len(again := _ill_conditioned(spec, part)):
        for rows in torch.split(again, block_size(x)):
            if len(rows) == 1:
                rows = rows.repeat(2)  # of which torch.compile would make a case of its own
            means = part[[anchor + 1 for anchor in _PAIRS]][:, rows].nan_to_num()
            part[:, rows] = _moved_partials(spec, of_rows(x, rows), means, fused=fused)
    for top in (Partial.TOP, Partial.TEACHER_TOP):
        part[top] += first_column
    return part[None]


def _moved_partials(spec: RowSpec, x: RowInputs, means: Tensor, *, fused: bool) -> Tensor:
    if fused:
        return compiled(_row_partials, spec)(x, means)
    parts = [_row_partials(spec, part, means[:, b]) for b, part in row_blocks(x)]
    return torch.cat(parts, dim=-1)


def _ill_conditioned(spec: RowSpec, part: Tensor) -> Tensor:
    """Rows (n,) int64 whose excess is small beside what was subtracted to move it to its mean."""
    chosen = torch.zeros(part.shape[-1], dtype=torch.bool)
    for pair, _ in pairs(spec):
        mean, excess = part[pair.anchor + 1].double(), part[pair.anchor + 2].double()
        subtracted = torch.where(mean.abs() < SERIES_RADIUS, remainder(mean), mean.expm1() - mean)
        chosen |= (subtracted > _LARGEST_MOVE * excess * mean.exp()) | (mean.abs() > _LARGEST_MEAN)
    return chosen.nonzero().squeeze(-1)


def row_likely(spec: RowSpec, x: RowInputs, *, fused: bool) -> Tensor:
    """(C, n) int64: the likeliest columns of each side."""
    if fused:
        found = compiled(_row_likely, spec)(x)
    else:
        found = torch.cat([_row_likely(spec, part) for _, part in row_blocks(x)], dim=1)
    maximum, place = found[::2], found[1::2]  # (sides, C, lanes)
    lanes = maximum.topk(min(_LIKELIEST, maximum.shape[-1])).indices
    columns = place.gather(-1, lanes).long() * maximum.shape[-1] + lanes
    return torch.cat(list(columns), dim=-1)


def row_mixture(spec: RowSpec, x: RowInputs, rows: Tensor, *, fused: bool) -> Tensor:
    """The sums of `mixture.mixture_sums` over the rows' one part, (1, 3, C)."""
    if fused:
        sums = compiled(_row_mixture, spec)(x, rows)
    else:
        parts = [_row_mixture(spec, part, rows[:, b]) for b, part in row_blocks(x)]
        sums = torch.cat(parts, dim=-1)
    return sums[None]


def row_stats(spec: RowSpec, x: RowInputs, *, fused: bool) -> Tensor:
    """Statistics of a chunk of whole rows, (len(Row), C): all of the above at once."""
    rows = finish(spec, row_partials(spec, x, fused=fused)[0], x)
    return finish_mixture(rows, row_mixture(spec, x, rows, fused=fused), x) if spec.jsd else rows
