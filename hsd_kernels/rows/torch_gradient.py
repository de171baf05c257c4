"""The gradient of a chunk in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.compiled import fused as compiled
from hsd_kernels.rows.mixture import log_mixture_ratio, mass_difference
from hsd_kernels.rows.torch_logits import (
    PLAIN_BLOCK_ELEMENTS,
    ChunkLogits,
    block_size,
    chunk_logits,
    of_rows,
    row_blocks,
    step,
    teacher_ratio,
)
from hsd_kernels.statistics import Coefficients, Row


def span(spec: RowSpec, logits: ChunkLogits, x: RowInputs, rows: Tensor, c: Coefficients) -> Tensor:
    """dL/dz (C, V) of all terms but the one-hot; `c` has (C, 1) each."""
    z, maximum = logits.z, rows[Row.MAX]
    centred = (z - maximum[:, None]) - rows[Row.LOGIT_MEAN][:, None]  # log p + H
    along_p = c.lse - c.logprob - c.entropy * centred
    log_p = (z - maximum[:, None]) - rows[Row.LOG_SUM][:, None]
    gradient = torch.zeros_like(z)
    if spec.forward_kl or spec.jsd:
        _, log_q, log_ratio = teacher_ratio(logits, rows, rows[Row.FORWARD_LOG_RATIO])
        if spec.forward_kl:
            gradient = c.forward_kl * mass_difference(log_p, log_q, log_ratio)
        if spec.jsd:
            p_over_m = -log_mixture_ratio(log_ratio, x)[0] - rows[Row.MIXTURE_ANCHOR][:, None]
            along_p = along_p + c.jsd * (p_over_m - rows[Row.MIXTURE_MEAN][:, None])
    if spec.reverse_kl and logits.u is not None:
        difference = None if logits.z_minus_u is None else -logits.z_minus_u
        e = step(z, maximum, logits.u, difference, rows[Row.REVERSE_ANCHOR])
        along_p = along_p + c.reverse_kl * (rows[Row.REVERSE_MEAN][:, None] - e)
    if logits.w is not None:
        difference = None if logits.z_minus_w is None else -logits.z_minus_w
        e = step(z, maximum, logits.w, difference, rows[Row.REFERENCE_ANCHOR])
        along_p = along_p + c.ref_kl * (rows[Row.REFERENCE_MEAN][:, None] - e)
    return gradient + log_p.exp() * along_p


def with_target(gradient: Tensor, x: RowInputs, c: Coefficients) -> Tensor:
    """A gradient (C, V) with the one-hot's share."""
    if x.targets is None:
        return gradient
    columns = torch.arange(gradient.shape[-1], dtype=torch.int32, device=gradient.device)
    return gradient + torch.where(columns == x.targets.int()[:, None], c.logprob, 0.0)


def _row_grad(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients, out: Tensor | None
) -> Tensor:
    logits = chunk_logits(spec, x)
    c = Coefficients(*(value[:, None] for value in coefficients))
    gradient = with_target(span(spec, logits, x, rows, c), x, c)
    slope = x.inverse_temperature[:, None] * x.logit_scale
    if spec.softcap:
        slope = slope * (1 - torch.tanh(x.student * x.logit_scale / x.softcap).square())
    gradient = gradient * slope
    (x.student if out is None else out).copy_(gradient)
    mass: Tensor = gradient.abs().sum(-1)
    return mass


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
    if fused and out is x.student and out.element_size() < 4:
        return _row_grad_by_blocks(spec, x, rows, coefficients)
    if fused:
        # Given twice, the buffer would be copied: torch.compile takes inputs apart that overlap.
        elsewhere = None if out is x.student else out
        return compiled(_row_grad, spec)(x, rows, coefficients, elsewhere)
    masses = []
    for b, part in row_blocks(x):
        own = Coefficients(*(c[b] for c in coefficients))
        masses.append(_row_grad(spec, part, rows[:, b], own, out[b]))
    return torch.cat(masses)


def _row_grad_by_blocks(
    spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients
) -> Tensor:
    """`row_grad` in place of narrow logits, through a block of rows that stays in cache.

    Half a vector is stored masked, and a load beside it, whose vector overlaps the masked half,
    waits for the store: written where it is read, a row takes 1.7 times as long.
    """
    size = math.ceil(block_size(x) / torch.get_num_threads()) * torch.get_num_threads()
    block = torch.empty_like(x.student[:size])
    masses = []
    for start in range(0, len(x.student), size):
        b = slice(start, start + size)
        part, own = of_rows(x, b), Coefficients(*(c[b] for c in coefficients))
        out = block[: len(part.student)]
        masses.append(compiled(_row_grad, spec)(part, rows[:, b], own, out))
        part.student.copy_(out)
    return torch.cat(masses)


def masses(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """sum |gradient| (C, V) of each column, (V,) fp64, and of each row, (C,)."""
    # Of few rows at a time: these sums vectorise, and those in fp64 do not.
    of_columns = torch.zeros(gradient.shape[1], dtype=torch.float64, device=gradient.device)
    of_rows = []
    for block in torch.split(gradient, max(1, PLAIN_BLOCK_ELEMENTS // max(gradient.shape[1], 1))):
        sizes = block.abs().to(torch.promote_types(block.dtype, torch.float32))
        of_columns += sizes.sum(0)
        of_rows.append(sizes.sum(-1))
    return of_columns, torch.cat(of_rows)
