"""One call of the loss, checked and flattened: what every backend is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd_kernels.plan import Precision
from hsd_kernels.token_losses import HsdLoss


@dataclass(frozen=True, kw_only=True)
class Side:
    """Teacher or reference: hidden states and the head they go through."""

    hidden: Tensor  # (N, D_side)
    weight: Tensor  # (V, D_side)
    bias: Tensor | None  # (V,)
    shared_head: bool  # the head is the student's


@dataclass(frozen=True, kw_only=True)
class Problem:
    """N tokens, V vocabulary columns in use; heads are already cut to them.

    Attributes:
        inputs: the (N,) vectors that the token loss reads, in the compute dtype.
        temperature: of log-probs, entropy and policy gradient; the KLs' student and reference
            side has `kl_temperature`, the teacher's `teacher_temperature`.
        one_temperature: the KLs share the log-probs' temperature.
        teacher_shares_temperature: `teacher_temperature` is `kl_temperature`.
        compute_dtype: of logits, statistics and accumulation: fp32, or fp64 for fp64 inputs.
    """

    student: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    teacher: Side | None
    reference: Side | None
    targets: Tensor | None  # (N,) int64
    inputs: Mapping[str, Tensor]  # (N,) each
    loss: HsdLoss
    jsd_beta: float
    temperature: Tensor  # (N,)
    kl_temperature: Tensor  # (N,)
    teacher_temperature: Tensor  # (N,)
    one_temperature: bool
    teacher_shares_temperature: bool
    logit_scale: float
    logit_softcap: float | None
    precision: Precision
    max_chunk_bytes: int | None
    compute_dtype: torch.dtype

    @property
    def active(self) -> Tensor:
        """(N,) bool: rows that enter a GEMM at all."""
        return self.inputs["token_weights"] != 0

    @property
    def needs_teacher(self) -> Tensor:
        """(N,) bool: active rows whose KL to the teacher carries weight."""
        return _carries(self.active, self.teacher, self.inputs.get("kl_weights"))

    @property
    def needs_reference(self) -> Tensor:
        """(N,) bool: active rows whose reference KL carries weight."""
        return _carries(self.active, self.reference, self.inputs.get("ref_weights"))


def _carries(active: Tensor, side: Side | None, weights: Tensor | None) -> Tensor:
    if side is None:
        return torch.zeros_like(active)
    return active if weights is None else active & (weights != 0)
