"""Floating-point operations of an op, from the shapes of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import flop_counter

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def flop_of(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Of a matrix product or attention, whose causal mask halves it; 0 for all else."""
    counter: Any = flop_counter
    if func is _attention:
        query, key, value, *rest = args
        whole = float(counter.sdpa_flop_count(query.shape, key.shape, value.shape))
        causal = rest[1] if len(rest) > 1 else kwargs.get("is_causal", False)
        return whole / 2 if causal else whole
    if func is _attention_backward:
        gradient, query, key, value, _out, _logsumexp, _dropout, causal = args
        shapes = (gradient.shape, query.shape, key.shape, value.shape)
        whole = float(counter.sdpa_backward_flop_count(*shapes))
        return whole / 2 if causal else whole
    formula = counter.flop_registry.get(getattr(func, "overloadpacket", None))
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))
