"""The dtype of activations."""

from __future__ import annotations

from typing import Literal

import torch


def compute_dtype(name: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The dtype that `model.compute_dtype` means here.

    "auto" is bfloat16 where the processor has instructions for it; elsewhere it is slow.
    """
    if name == "auto":
        found = torch.cpu.get_capabilities()
        native = any(found.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if native else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16
