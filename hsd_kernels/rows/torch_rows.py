"""The row kernels in PyTorch: fused by torch.compile where there is a C++ compiler, else plain.

Both run the same source and give the same result up to rounding. Unfused, every line is a pass over
memory with a temporary of its own; then the rows go through in small blocks.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowKernels, RowSpec
from hsd_kernels.rows.compiled import fused as compiled
from hsd_kernels.rows.mixture import finish_mixture, mixture_sums
from hsd_kernels.rows.partials import Partial, excess, exp_again, finish
from hsd_kernels.rows.torch_errors import row_errors
from hsd_kernels.rows.torch_gradient import column_mass, row_grad
from hsd_kernels.rows.torch_logits import chunk_logits, row_blocks, step, teacher_ratio
from hsd_kernels.statistics import Row

_SUM_OF = {  # the base's sum, by a pair's first line
    Partial.FORWARD_ANCHOR: Partial.TEACHER_SUM,
    Partial.REVERSE_ANCHOR: Partial.SUM,
    Partial.REFERENCE_ANCHOR: Partial.SUM,
}


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """values (C, V) at one column per row (C, 1), as (C,)."""
    return values.gather(-1, columns).squeeze(-1)


def _row_partials(spec: RowSpec, x: RowInputs) -> Tensor:
    z, u, z_minus_u, w, z_minus_w = chunk_logits(spec, x)
    lines: dict[Partial, Tensor] = {}

    def side(logits: Tensor, first: Partial, target: Partial) -> tuple[Tensor, Tensor]:
        maximum, top = logits.amax(-1), logits.argmax(-1, keepdim=True)
        shifted = logits - maximum[:, None]
        total = lines[Partial(first + 1)] = shifted.exp().sum(-1)
        lines[first] = maximum
        lines[Partial(first + 2)] = (exp_again(shifted) * shifted).sum(-1) / total
        lines[Partial(first + 3)] = top.squeeze(-1).to(maximum.dtype)
        if x.targets is not None:
            inside = x.targets >= 0
            own = _at(logits, x.targets.clamp(min=0)[:, None])
            lines[target] = torch.where(inside, own, -torch.inf)
        return maximum, top

    def pair(
        base: Tensor,
        base_max: Tensor,
        top: Tensor,
        other: Tensor,
        difference: Tensor | None,
        first: Partial,
    ) -> None:
        anchor = _at(other if difference is None else difference, top)
        e = step(base, base_max, other, difference, anchor)
        shifted = base - base_max[:, None]
        total = lines[_SUM_OF[first]]
        mean = (exp_again(shifted) * e).sum(-1) / total
        lines[first], lines[Partial(first + 1)] = anchor, mean
        lines[Partial(first + 2)] = excess(shifted, e - mean[:, None]).sum(-1) / total

    z_max, z_top = side(z, Partial.MAX, Partial.TARGET)
    if u is not None:
        u_max, u_top = side(u, Partial.TEACHER_MAX, Partial.TEACHER_TARGET)
        u_minus_z = None if z_minus_u is None else -z_minus_u
        if spec.forward_kl or spec.jsd:
            pair(u, u_max, u_top, z, z_minus_u, Partial.FORWARD_ANCHOR)
        if spec.reverse_kl or spec.jsd:
            pair(z, z_max, z_top, u, u_minus_z, Partial.REVERSE_ANCHOR)
    if w is not None:
        w_max = w.amax(-1)
        lines[Partial.REFERENCE_MAX] = w_max
        lines[Partial.REFERENCE_SUM] = (w - w_max[:, None]).exp().sum(-1)
        w_minus_z = None if z_minus_w is None else -z_minus_w
        pair(z, z_max, z_top, w, w_minus_z, Partial.REFERENCE_ANCHOR)
    absent = torch.full_like(z_max, torch.nan)
    return torch.stack([lines.get(name, absent) for name in Partial])


def _row_mixture(spec: RowSpec, x: RowInputs, rows: Tensor) -> Tensor:
    logits = chunk_logits(spec, x)
    ratio = teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
    return mixture_sums(*ratio, rows[Row.MIXTURE_ANCHOR], x)


def _row_stats(spec: RowSpec, x: RowInputs) -> Tensor:
    rows = finish(spec, _row_partials(spec, x), x)
    return finish_mixture(rows, _row_mixture(spec, x, rows)[None], x) if spec.jsd else rows


def row_kernels(*, fused: bool) -> RowKernels:
    """These kernels, compiled or plain."""
    return RowKernels(
        partials=functools.partial(row_partials, fused=fused),
        mixture=functools.partial(row_mixture, fused=fused),
        grad=functools.partial(row_grad, fused=fused),
        errors=functools.partial(row_errors, fused=fused),
        column_mass=column_mass,
        stats=functools.partial(row_stats, fused=fused),
    )


def row_partials(spec: RowSpec, x: RowInputs, *, first_column: int = 0, fused: bool) -> Tensor:
    """The rows' one part, (1, len(Partial), C); `first_column` is the column of the vocabulary."""
    if fused:
        part = compiled(_row_partials, spec)(x)
    else:
        part = torch.cat([_row_partials(spec, part) for b, part in row_blocks(x)], dim=-1)
    for top in (Partial.TOP, Partial.TEACHER_TOP):
        part[top] += first_column
    return part[None]


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
    if fused:
        return compiled(_row_stats, spec)(x)
    return torch.cat([_row_stats(spec, part) for b, part in row_blocks(x)], dim=-1)
