"""Rows of logits in memory, as the Triton kernels need them."""

from __future__ import annotations

import torch
from torch import Tensor

PITCH_MULTIPLE = 16  # elements; also what Triton can know of the divisibility of an integer


def row_buffer(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, columns) view of rows of the pitch that the kernels need."""
    pitch = max(-(-columns // PITCH_MULTIPLE), 1) * PITCH_MULTIPLE
    return torch.empty((rows, pitch), dtype=dtype, device=device)[:, :columns]
