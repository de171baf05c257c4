"""torch.compile for the row kernels on the CPU."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.rows import RowSpec

# Inductor would write values with many uses to (C, V) buffers; to recompute them from a row in
# cache is twice as fast and needs no memory.
_RECOMPUTE: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "cpp.enable_floating_point_contract_flag": "fast",
}


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
def fused(kernel: Callable[..., Tensor], spec: RowSpec) -> Callable[..., Tensor]:
    """`kernel` compiled for one `RowSpec`, for any number of rows and columns."""
    # Dynamo counts recompilations per code object: a fresh one for each specification.
    code = kernel.__code__.replace()
    fresh = types.FunctionType(code, kernel.__globals__, f"{kernel.__name__}_fused")
    # Bound outside: all partial objects that are compiled share one code object of torch's.
    compiled = torch.compile(fresh, dynamic=True, fullgraph=True, options=_RECOMPUTE)
    return functools.partial(compiled, spec)
