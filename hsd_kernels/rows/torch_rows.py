"""The row kernels in PyTorch: fused by torch.compile where there is a C++ compiler, else plain.

Both run the same source and give the same result up to rounding. Unfused, every line is a pass over
memory with a temporary of its own; then the rows go through in small blocks.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec, Source
from hsd_kernels.statistics import Coefficients, Row

# nats: where log sum q exp(e) is formed by log1p. Above, the sum overflows; below, it cancels.
_ANCHORED_LOG_RATIO = (-3.0, 20.0)
_PLAIN_BLOCK_ELEMENTS = 1 << 21
# Inductor would write values with many uses to (C, V) buffers; to recompute them from a row in
# cache is twice as fast and needs no memory.
_RECOMPUTE: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
}


def _logits(spec: RowSpec, raw: Tensor, x: RowInputs, inverse_temperature: Tensor) -> Tensor:
    scaled = raw * x.logit_scale
    if spec.softcap:
        scaled = x.softcap * torch.tanh(scaled / x.softcap)
    return scaled * inverse_temperature[:, None]


def _other(
    spec: RowSpec, source: Source, x: RowInputs, raw: Tensor, z: Tensor, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits u (C, V) of the other side, and z - u where it is known better than by subtraction."""
    if source == "difference":
        if not spec.softcap and spec.same_temperature:
            difference = raw * (x.logit_scale * x.inverse_temperature[:, None])
            return z - difference, difference
        raw = x.student - raw
    return _logits(spec, raw, x, inverse_temperature), None


def _anchored(
    z: Tensor, u: Tensor, difference: Tensor | None, anchor: Tensor, u_max: Tensor
) -> Tensor:
    """e = (z - z_k) - (u - u_k), (C, V); see `Row`.

    Each bracket is exact for the tokens that carry mass, whatever the offset of the logits.
    """
    if difference is not None:
        return difference - anchor[:, None]
    return (z - anchor[:, None]) - (u - u_max[:, None])


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 to a few ulp: torch.compile turns torch.expm1 into just that subtraction."""
    return torch.tanh(x / 2) * (x.exp() + 1)


def _lse(z: Tensor) -> tuple[Tensor, Tensor]:
    maximum = z.amax(-1)
    return maximum, (z - maximum[:, None]).exp().sum(-1).log()


def _log_ratio(
    z: Tensor, u: Tensor, difference: Tensor | None, lse: Tensor, u_max: Tensor, u_log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchor (C,), log sum q exp(e) (C,), and the other side's most likely token (C,)."""
    top = u.argmax(-1, keepdim=True)
    anchor = (z if difference is None else difference).gather(-1, top).squeeze(-1)
    e = _anchored(z, u, difference, anchor, u_max)
    # sum q expm1(e), each term formed without overflow; log1p keeps the digits that
    # lse - lse loses once student and teacher are close.
    log_q = (u - u_max[:, None]) - u_log_sum[:, None]
    larger = (log_q + e.clamp(min=0)).clamp(max=60.0).exp()
    excess = torch.copysign(larger * -_expm1(-e.abs()), e).sum(-1)
    z_at_top = z.gather(-1, top).squeeze(-1)
    far = (lse - z_at_top) - u_log_sum
    near = (far > _ANCHORED_LOG_RATIO[0]) & (far < _ANCHORED_LOG_RATIO[1])
    return anchor, torch.where(near, torch.log1p(excess), far), top.squeeze(-1)


def _mass_difference(log_p: Tensor, log_q: Tensor, log_ratio: Tensor) -> Tensor:
    """p - q from log p - log q, without cancellation and without overflow."""
    larger = torch.maximum(log_p, log_q).exp()
    return torch.copysign(larger * -_expm1(-log_ratio.abs()), log_ratio)


def _log_mixture_ratio(log_ratio: Tensor, x: RowInputs) -> tuple[Tensor, Tensor]:
    """log m - log p and log m - log q for m = beta q + (1 - beta) p.

    Formed from the side that weighs more: log m/p = log1p(beta expm1(log q/p)) for beta <= 1/2.
    Then neither 1 + ... nor the step to the other side cancels, however small the other's weight.
    """
    student_heavier = x.jsd_beta <= x.jsd_complement
    lighter = torch.minimum(x.jsd_beta, x.jsd_complement)
    to_lighter = torch.where(student_heavier, -log_ratio, log_ratio)
    bounded = to_lighter.clamp(max=60.0)
    of_heavier = torch.log1p(lighter * _expm1(bounded)) + (to_lighter - bounded)
    of_lighter = of_heavier - to_lighter
    return (
        torch.where(student_heavier, of_heavier, of_lighter),
        torch.where(student_heavier, of_lighter, of_heavier),
    )


def _centred_mean(p: Tensor, values: Tensor, mean: Tensor) -> Tensor:
    """(C,) sum p (values - mean): zero, but for the rounding of `mean` and of the values."""
    return (p * (values - mean[:, None])).sum(-1)


def _row_stats(spec: RowSpec, x: RowInputs) -> Tensor:
    z = _logits(spec, x.student, x, x.inverse_temperature)
    maximum, log_sum = _lse(z)
    lse = maximum + log_sum
    log_p = (z - maximum[:, None]) - log_sum[:, None]
    p = log_p.exp()
    rows = {Row.MAX: maximum, Row.LOG_SUM: log_sum, Row.ENTROPY: -(p * log_p).sum(-1)}
    if x.targets is not None:
        rows[Row.LOGPROB] = log_p.gather(-1, x.targets[:, None]).squeeze(-1)

    if x.teacher is not None:
        u, difference = _other(spec, spec.teacher, x, x.teacher, z, x.teacher_inverse_temperature)
        u_max, u_log_sum = _lse(u)
        anchor, log_ratio_sum, top = _log_ratio(z, u, difference, lse, u_max, u_log_sum)
        log_q = (u - u_max[:, None]) - u_log_sum[:, None]
        q = log_q.exp()
        log_ratio = _anchored(z, u, difference, anchor, u_max) - log_ratio_sum[:, None]
        p_minus_q = _mass_difference(log_p, log_q, log_ratio)
        rows[Row.TEACHER_MAX] = u_max
        rows[Row.TEACHER_LOG_SUM] = u_log_sum
        rows[Row.TEACHER_ANCHOR] = anchor
        rows[Row.TEACHER_LOG_RATIO] = log_ratio_sum
        rows[Row.TEACHER_ENTROPY] = -(q * log_q).sum(-1)
        rows[Row.TOP1_AGREE] = (z.gather(-1, top[:, None]).squeeze(-1) == maximum).to(z.dtype)
        if x.targets is not None:
            rows[Row.TEACHER_LOGPROB] = log_q.gather(-1, x.targets[:, None]).squeeze(-1)
        # sum (p - q) = 0 turns each KL into a sum of terms >= 0: nothing of first order cancels.
        if spec.forward_kl:
            rows[Row.FORWARD_KL] = (p_minus_q - q * log_ratio).sum(-1)
        if spec.reverse_kl:
            reverse_kl = (p * log_ratio - p_minus_q).sum(-1)
            rows[Row.REVERSE_KL] = reverse_kl
            rows[Row.REVERSE_RESIDUAL] = _centred_mean(p, log_ratio, reverse_kl)
        if spec.jsd:
            m_over_p, m_over_q = _log_mixture_ratio(log_ratio, x)
            student_kl = -(p * m_over_p + x.jsd_beta * p_minus_q).sum(-1)
            teacher_kl = (x.jsd_complement * p_minus_q - q * m_over_q).sum(-1)
            rows[Row.STUDENT_MIXTURE_KL] = student_kl
            rows[Row.MIXTURE_RESIDUAL] = _centred_mean(p, -m_over_p, student_kl)
            rows[Row.JSD] = x.jsd_beta * teacher_kl + x.jsd_complement * student_kl

    if x.reference is not None:
        w, difference = _other(spec, spec.reference, x, x.reference, z, x.inverse_temperature)
        w_max, w_log_sum = _lse(w)
        anchor, log_ratio_sum, _ = _log_ratio(z, w, difference, lse, w_max, w_log_sum)
        log_r = (w - w_max[:, None]) - w_log_sum[:, None]
        log_ratio = _anchored(z, w, difference, anchor, w_max) - log_ratio_sum[:, None]
        rows[Row.REFERENCE_MAX] = w_max
        rows[Row.REFERENCE_LOG_SUM] = w_log_sum
        rows[Row.REFERENCE_ANCHOR] = anchor
        rows[Row.REFERENCE_LOG_RATIO] = log_ratio_sum
        ref_kl = (p * log_ratio - _mass_difference(log_p, log_r, log_ratio)).sum(-1)
        rows[Row.REF_KL] = ref_kl
        rows[Row.REFERENCE_RESIDUAL] = _centred_mean(p, log_ratio, ref_kl)

    absent = torch.full_like(maximum, torch.nan)
    return torch.stack([rows.get(name, absent) for name in Row])


def _log_ratio_from(
    rows: Tensor, z: Tensor, u: Tensor, difference: Tensor | None, first: Row
) -> Tensor:
    """log p - log q from the four statistics of `Row` that start at `first`."""
    u_max, _, anchor, log_ratio_sum = rows[first : first + 4]
    log_ratio: Tensor = _anchored(z, u, difference, anchor, u_max) - log_ratio_sum[:, None]
    return log_ratio


def _row_grad(spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients) -> Tensor:
    z = _logits(spec, x.student, x, x.inverse_temperature)
    log_p = (z - rows[Row.MAX][:, None]) - rows[Row.LOG_SUM][:, None]
    p = log_p.exp()
    c = Coefficients(*(value[:, None] for value in coefficients))
    along_p = c.p - c.target + c.log_p * log_p
    gradient = torch.zeros_like(p)
    if x.teacher is not None:
        u, difference = _other(spec, spec.teacher, x, x.teacher, z, x.teacher_inverse_temperature)
        log_ratio = _log_ratio_from(rows, z, u, difference, Row.TEACHER_MAX)
        if spec.reverse_kl:
            along_p = along_p + c.teacher * (log_ratio - rows[Row.REVERSE_KL][:, None])
        if spec.jsd:
            p_over_m = -_log_mixture_ratio(log_ratio, x)[0]
            along_p = along_p + c.mixture * (p_over_m - rows[Row.STUDENT_MIXTURE_KL][:, None])
        if spec.forward_kl:
            log_q = (u - rows[Row.TEACHER_MAX][:, None]) - rows[Row.TEACHER_LOG_SUM][:, None]
            gradient = c.difference * _mass_difference(log_p, log_q, log_ratio)
    if x.reference is not None:
        w, difference = _other(spec, spec.reference, x, x.reference, z, x.inverse_temperature)
        log_ratio = _log_ratio_from(rows, z, w, difference, Row.REFERENCE_MAX)
        along_p = along_p + c.reference * (log_ratio - rows[Row.REF_KL][:, None])
    gradient = gradient + p * along_p
    if x.targets is not None:
        columns = torch.arange(z.shape[-1], device=z.device)
        gradient = gradient + torch.where(columns == x.targets[:, None], c.target, 0.0)
    slope = x.inverse_temperature[:, None] * x.logit_scale
    if spec.softcap:
        slope = slope * (1 - torch.tanh(x.student * x.logit_scale / x.softcap).square())
    gradient = gradient * slope
    x.student.copy_(gradient)
    mass: Tensor = gradient.abs().sum(-1)
    return mass


def row_stats(spec: RowSpec, x: RowInputs, *, fused: bool) -> Tensor:
    """Statistics of a chunk of rows, (len(Row), C); reads each row, writes none."""
    if fused:
        return _fused(_row_stats, spec)(x)
    return torch.cat([_row_stats(spec, _slice(x, b)) for b in _blocks(x.student)], dim=-1)


def row_grad(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients, *, fused: bool
) -> Tensor:
    """Overwrites `x.student` with dL/d(raw logits); returns its L1 mass per row, (C,)."""
    if fused:
        return _fused(_row_grad, spec)(x, rows, coefficients)
    return torch.cat(
        [
            _row_grad(spec, _slice(x, b), rows[:, b], Coefficients(*(c[b] for c in coefficients)))
            for b in _blocks(x.student)
        ]
    )


def _blocks(student: Tensor) -> list[slice]:
    rows, columns = student.shape
    size = max(1, _PLAIN_BLOCK_ELEMENTS // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _slice(x: RowInputs, block: slice) -> RowInputs:
    parts: list[Any] = [t if t is None or t.dim() == 0 else t[block] for t in x]
    return RowInputs(*parts)


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
