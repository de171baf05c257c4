"""What differs between the backends: row kernels and matrix products."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowInputs, RowKernels, RowSpec
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import finish
from hsd_kernels.rows.torch_rows import row_kernels

_ADDED_ROWS = 512


def kernels_of(problem: Problem, *, fused: bool) -> RowKernels:
    """The row kernels of the backend that a problem's settings name.

    Raises:
        ValueError: it cannot run these tensors here.
    """
    device = problem.student.device
    if problem.settings.backend == "cpu":
        return row_kernels(fused=fused)
    if problem.student.dtype == torch.float64:
        raise ValueError("backend: found 'triton' with float64, expected 'cpu' or 'reference'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend: found 'triton' with CPU tensors, expected tensors on a GPU "
            "(or TRITON_INTERPRET=1, to try the kernels)"
        )
    try:
        from hsd_kernels.rows import triton_rows
    except ModuleNotFoundError:
        raise ValueError(
            "backend: found 'triton' without triton, which comes with the GPU builds of torch"
        ) from None
    return RowKernels(
        partials=_tiles_partials,
        mixture=triton_rows.row_mixture,
        grad=triton_rows.row_grad,
        errors=triton_rows.row_errors,
        checked=None,
        masses=triton_rows.masses,
        stats=_merged_statistics,
    )


def _tiles_partials(spec: RowSpec, x: RowInputs, *, first_column: int = 0) -> Tensor:
    """(1, len(Partial), C) of all tiles."""
    from hsd_kernels.rows import triton_rows

    parts = triton_rows.row_partials(spec, x, first_column=first_column)
    return triton_rows.merge_tiles(spec, parts)


def _merged_statistics(spec: RowSpec, x: RowInputs) -> Tensor:
    """(len(Row), C) of the tiles' parts."""
    from hsd_kernels.rows import triton_rows

    rows = finish(spec, _tiles_partials(spec, x)[0], x)
    if not spec.jsd:
        return rows
    return finish_mixture(rows, triton_rows.row_mixture(spec, x, rows), x)


def multiply(
    a: Tensor, b: Tensor, out: Tensor, *, rounded: bool = False, product: Tensor | None = None
) -> None:
    """out = a b, accumulated and stored in `out`'s dtype; a is (N, K), b (K, M).

    `rounded`: it may go through the operands' dtype where this build has no wider output; through
    `product`, memory of that dtype, where given.
    """
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _wide_output(a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif product is not None:
        out.copy_(torch.mm(a, b, out=product))
    elif rounded:
        out.copy_(torch.mm(a, b))
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def multiply_add(a: Tensor, b: Tensor, total: Tensor, *, product: Tensor | None = None) -> None:
    """total += a b, as above."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _wide_output(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif product is not None:
        torch.mm(a, b, out=product)
        # Of few rows at a time: a sum of two dtypes converts one of them as a whole.
        blocks = (torch.split(each, _ADDED_ROWS) for each in (total, product))
        for own, part in zip(*blocks, strict=True):
            own += part
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@functools.cache
def _wide_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build multiplies narrow operands into fp32 (torch >= 2.8 on CUDA does)."""
    a = torch.ones((16, 16), dtype=dtype, device=device)
    total = torch.ones((16, 16), dtype=torch.float32, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32, out=total)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((total == 32).all())
