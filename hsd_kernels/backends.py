"""What differs between the backends: row kernels, dtypes of operands, buffers, matrix products."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowInputs, RowKernels, RowSpec
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import finish, merge
from hsd_kernels.rows.torch_rows import row_kernels


@dataclass(frozen=True, kw_only=True)
class Device:
    """How a backend works.

    Attributes:
        kernels: of rows.
        operand_dtype: of heads, hidden states and logit gradients in matrix products. Logits and
            gradients of parameters are formed in the compute dtype whatever it is.
        new_rows: (rows, columns, dtype) -> an uninitialised chunk buffer.
    """

    kernels: RowKernels
    operand_dtype: torch.dtype
    new_rows: Callable[[int, int, torch.dtype], Tensor]


def device_of(problem: Problem, *, fused: bool) -> Device:
    """The backend that a problem's settings name.

    Raises:
        ValueError: it cannot run these tensors here.
    """
    device = problem.student.device
    if problem.settings.backend == "cpu":
        return Device(
            kernels=row_kernels(fused=fused),
            operand_dtype=problem.compute_dtype,
            new_rows=lambda rows, columns, dtype: torch.empty(
                (rows, columns), dtype=dtype, device=device
            ),
        )
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
    return Device(
        kernels=RowKernels(
            partials=triton_rows.row_partials,
            mixture=triton_rows.row_mixture,
            grad=triton_rows.row_grad,
            stats=_merged_statistics,
        ),
        operand_dtype=problem.student.dtype,
        new_rows=functools.partial(_pitched, device),
    )


def _pitched(device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    from hsd_kernels.rows.triton_rows import row_buffer

    return row_buffer(rows, columns, dtype=dtype, device=device)


def _merged_statistics(spec: RowSpec, x: RowInputs) -> Tensor:
    """(len(Row), C) of the tiles' parts."""
    from hsd_kernels.rows import triton_rows

    rows = finish(spec, merge(spec, triton_rows.row_partials(spec, x)), x)
    if not spec.jsd:
        return rows
    return finish_mixture(rows, triton_rows.row_mixture(spec, x, rows), x)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated and stored in `out`'s dtype; a is (N, K), b (K, M)."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif _wide_output(a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def multiply_add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _wide_output(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
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
