"""The row kernels in PyTorch: fused by torch.compile where there is a C++ compiler, else plain.

Both run the same source and give the same result up to rounding. Unfused, every line is a pass over
memory with a temporary of its own; then the rows go through in small blocks.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowKernels, RowSpec, Source, known_difference
from hsd_kernels.rows.mixture import (
    finish_mixture,
    log_mixture_ratio,
    mass_difference,
    mixture_sums,
)
from hsd_kernels.rows.partials import Partial, excess, exp_again, finish
from hsd_kernels.statistics import Coefficients, Row

_SUM_OF = {  # the base's sum, by a pair's first line
    Partial.FORWARD_ANCHOR: Partial.TEACHER_SUM,
    Partial.REVERSE_ANCHOR: Partial.SUM,
    Partial.REFERENCE_ANCHOR: Partial.SUM,
}
_PLAIN_BLOCK_ELEMENTS = 1 << 21
# Inductor would write values with many uses to (C, V) buffers; to recompute them from a row in
# cache is twice as fast and needs no memory.
_RECOMPUTE: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
}


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


def _step(
    base: Tensor, base_max: Tensor, other: Tensor, difference: Tensor | None, anchor: Tensor
) -> Tensor:
    """e = (y - y_k) - (x - x_k), (C, V), of base x and other y; `difference` is y - x if known.

    Each bracket is exact for the tokens that carry mass, whatever the offset of the logits.
    """
    if difference is not None:
        return difference - anchor[:, None]
    return (other - anchor[:, None]) - (base - base_max[:, None])


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
        e = _step(base, base_max, other, difference, anchor)
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


def _teacher_ratio(
    logits: ChunkLogits, rows: Tensor, log_ratio_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p, log q and log p - log q, (C, V) each."""
    z, u, z_minus_u = logits.z, logits.u, logits.z_minus_u
    if u is None:
        raise RuntimeError("a row without a teacher was asked for its divergence")
    log_p = (z - rows[Row.MAX][:, None]) - rows[Row.LOG_SUM][:, None]
    log_q = (u - rows[Row.TEACHER_MAX][:, None]) - rows[Row.TEACHER_LOG_SUM][:, None]
    e = _step(u, rows[Row.TEACHER_MAX], z, z_minus_u, rows[Row.FORWARD_ANCHOR])
    return log_p, log_q, e - log_ratio_sum[:, None]


def _row_mixture(spec: RowSpec, x: RowInputs, rows: Tensor) -> Tensor:
    logits = chunk_logits(spec, x)
    ratio = _teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
    return mixture_sums(*ratio, rows[Row.MIXTURE_ANCHOR], x)


def _row_stats(spec: RowSpec, x: RowInputs) -> Tensor:
    rows = finish(spec, _row_partials(spec, x), x)
    return finish_mixture(rows, _row_mixture(spec, x, rows)[None], x) if spec.jsd else rows


def _row_grad(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients, out: Tensor | None
) -> Tensor:
    logits = chunk_logits(spec, x)
    z, maximum = logits.z, rows[Row.MAX]
    c = Coefficients(*(value[:, None] for value in coefficients))
    centred = (z - maximum[:, None]) - rows[Row.LOGIT_MEAN][:, None]  # log p + H
    along_p = c.lse - c.logprob - c.entropy * centred
    log_p = (z - maximum[:, None]) - rows[Row.LOG_SUM][:, None]
    gradient = torch.zeros_like(z)
    if spec.forward_kl or spec.jsd:
        _, log_q, log_ratio = _teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
        if spec.forward_kl:
            gradient = c.forward_kl * mass_difference(log_p, log_q, log_ratio)
        if spec.jsd:
            p_over_m = -log_mixture_ratio(log_ratio, x)[0] - rows[Row.MIXTURE_ANCHOR][:, None]
            along_p = along_p + c.jsd * (p_over_m - rows[Row.MIXTURE_MEAN][:, None])
    if spec.reverse_kl and logits.u is not None:
        difference = None if logits.z_minus_u is None else -logits.z_minus_u
        e = _step(z, maximum, logits.u, difference, rows[Row.REVERSE_ANCHOR])
        along_p = along_p + c.reverse_kl * (rows[Row.REVERSE_MEAN][:, None] - e)
    if logits.w is not None:
        difference = None if logits.z_minus_w is None else -logits.z_minus_w
        e = _step(z, maximum, logits.w, difference, rows[Row.REFERENCE_ANCHOR])
        along_p = along_p + c.ref_kl * (rows[Row.REFERENCE_MEAN][:, None] - e)
    gradient = gradient + log_p.exp() * along_p
    if x.targets is not None:
        columns = torch.arange(z.shape[-1], device=z.device)
        gradient = gradient + torch.where(columns == x.targets[:, None], c.logprob, 0.0)
    slope = x.inverse_temperature[:, None] * x.logit_scale
    if spec.softcap:
        slope = slope * (1 - torch.tanh(x.student * x.logit_scale / x.softcap).square())
    gradient = gradient * slope
    (x.student if out is None else out).copy_(gradient)
    mass: Tensor = gradient.abs().sum(-1)
    return mass


def row_kernels(*, fused: bool) -> RowKernels:
    """These kernels, compiled or plain."""
    return RowKernels(
        partials=functools.partial(row_partials, fused=fused),
        mixture=functools.partial(row_mixture, fused=fused),
        grad=functools.partial(row_grad, fused=fused),
        stats=functools.partial(row_stats, fused=fused),
    )


def row_partials(spec: RowSpec, x: RowInputs, *, first_column: int = 0, fused: bool) -> Tensor:
    """The rows' one part, (1, len(Partial), C); `first_column` is the column of the vocabulary."""
    if fused:
        part = _fused(_row_partials, spec)(x)
    else:
        part = torch.cat([_row_partials(spec, part) for b, part in row_blocks(x)], dim=-1)
    for top in (Partial.TOP, Partial.TEACHER_TOP):
        part[top] += first_column
    return part[None]


def row_mixture(spec: RowSpec, x: RowInputs, rows: Tensor, *, fused: bool) -> Tensor:
    """The sums of `mixture.mixture_sums` over the rows' one part, (1, 3, C)."""
    if fused:
        sums = _fused(_row_mixture, spec)(x, rows)
    else:
        parts = [_row_mixture(spec, part, rows[:, b]) for b, part in row_blocks(x)]
        sums = torch.cat(parts, dim=-1)
    return sums[None]


def row_stats(spec: RowSpec, x: RowInputs, *, fused: bool) -> Tensor:
    """Statistics of a chunk of whole rows, (len(Row), C): all of the above at once."""
    if fused:
        return _fused(_row_stats, spec)(x)
    return torch.cat([_row_stats(spec, part) for b, part in row_blocks(x)], dim=-1)


def row_grad(
    spec: RowSpec,
    x: RowInputs,
    rows: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    *,
    fused: bool,
) -> Tensor:
    """Writes dL/d(raw logits) to `out`, (C, V); returns its L1 mass per row, (C,).

    `out` may be `x.student`: an element is read before it is written.
    """
    if fused:
        # Given twice, the buffer would be copied: torch.compile takes inputs apart that overlap.
        elsewhere = None if out is x.student else out
        return _fused(_row_grad, spec)(x, rows, coefficients, elsewhere)
    masses = []
    for b, part in row_blocks(x):
        own = Coefficients(*(c[b] for c in coefficients))
        masses.append(_row_grad(spec, part, rows[:, b], own, out[b]))
    return torch.cat(masses)


def row_blocks(x: RowInputs) -> Iterator[tuple[slice, RowInputs]]:
    """Blocks of rows that keep the temporaries of plain PyTorch small."""
    rows, columns = x.student.shape
    size = max(1, _PLAIN_BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        parts: list[Any] = [t if t is None or t.dim() == 0 else t[block] for t in x]
        yield block, RowInputs(*parts)


@functools.cache
def compiler_found() -> bool:
    """Whether torch.compile can build CPU code here."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True


@functools.cache
def _fused(kernel: Callable[..., Tensor], spec: RowSpec) -> Callable[..., Tensor]:
    """`kernel` compiled for one `RowSpec`, for any number of rows and columns."""
    # Dynamo counts recompilations per code object: a fresh one for each specification.
    code = kernel.__code__.replace()
    fresh = types.FunctionType(code, kernel.__globals__, f"{kernel.__name__}_fused")
    # Bound outside: all partial objects that are compiled share one code object of torch's.
    compiled = torch.compile(fresh, dynamic=True, fullgraph=True, options=_RECOMPUTE)
    return functools.partial(compiled, spec)
