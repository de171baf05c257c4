"""Gradients that forward has formed, times the upstream gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

_CPU_ROWS = 512  # that are rounded at a time


def scaled(gradient: Tensor, upstream: Tensor, of: Tensor) -> Tensor:
    """What a backward returns; `gradient`, which it had saved, may be gone after it.

    Args:
        gradient: of the shape of `of`, fp32 or fp64.
        upstream: ().
        of: the tensor whose gradient it is.
    """
    if gradient.dtype == of.dtype and _last_use(gradient):
        # A V x D copy less. Whether upstream is 1 is not known without waiting for the GPU.
        return gradient.mul_(upstream)
    found: Tensor = torch.ops.hsd_kernels.scale(gradient, upstream, of)
    return found


def product(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded as it is written: `(gradient * upstream).to(dtype)` would hold both."""
    found = torch.empty_like(gradient, dtype=dtype)
    # A CPU would hold them for `torch.mul(..., out=found)` too.
    size = _CPU_ROWS if gradient.device.type == "cpu" else max(len(gradient), 1)
    for out, rows in zip(torch.split(found, size), torch.split(gradient, size), strict=True):
        torch.mul(rows, upstream, out=out)
    return found


def _last_use(saved: Tensor) -> bool:
    """Whether nothing reads what a backward has saved after it: it may be overwritten."""
    return not (
        # A graph that is traced may run with retain_graph, and may return what it saves.
        torch.compiler.is_compiling()
        or isinstance(saved, FunctionalTensor)
        or torch.is_grad_enabled()  # create_graph: `scale` refuses a second derivative
        or torch._C._autograd._get_current_graph_task_keep_graph()
    )


@torch.library.custom_op("hsd_kernels::scale", mutates_args=())
def scale_op(gradient: Tensor, upstream: Tensor, of: Tensor) -> Tensor:
    """gradient * upstream in the dtype of the tensor `of` whose gradient it is."""
    return product(gradient, upstream, of.dtype)


@scale_op.register_fake
def _(gradient: Tensor, upstream: Tensor, of: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=of.dtype)


def _refuse(ctx: Any, *_: Any) -> None:
    # The formed gradients would pass for constants, and a second derivative silently lack them.
    raise RuntimeError(
        "hsd_kernels: found a second derivative, but gradients are formed once and cannot be "
        "differentiated again; expected backend='reference' for that"
    )


scale_op.register_autograd(_refuse)
