"""One call, checked and flattened: what every backend is given.

Its fields are tensors, numbers and strings, which the custom ops of `hsd_kernels.ops` take one by
one: `arguments` makes a problem of a user's call, `ops` takes it apart and puts it together again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd_kernels.plan import Backend, Precision
from hsd_kernels.token_losses import (
    HSD_LOSS,
    LINEAR_LOSS,
    LinearLoss,
    TokenLoss,
    find_token_loss,
    hsd_loss_from,
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """Teacher or reference: hidden states and the head they go through."""

    hidden: Tensor  # (N, D_side)
    weight: Tensor  # (V, D_side)
    bias: Tensor | None  # (V,)
    shared_head: bool  # the head is the student's


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers and names of a problem.

    Attributes:
        loss: HSD_LOSS, LINEAR_LOSS, or the key of a token loss of one's own.
        loss_scalars: what `HsdLoss.scalars` gave; () for the others.
        divergence: what the HSD loss pulls by; "" for none.
        statistics: names that are computed, comma-separated: the loss reads no others.
        one_temperature: the KLs share the log-probs' temperature.
        teacher_shares_temperature: the teacher's temperature is the KLs'.
        vocab_size: V, columns in use; the head's rows beyond them are padding.
        sparse_tolerance: share of a chunk's gradient mass that may be dropped; None: dense.
        sparse_max_columns: a chunk that needs more runs dense; None: no cap.
        top_k: ids and log-probs of the k most likely tokens that are wanted of both sides.
        group: name of the process group whose ranks hold shards of the head; "" for none.
        validate: whether values are checked off the CPU too.
        backend: whose row kernels run.
    """

    loss: str
    loss_scalars: tuple[float, ...]
    divergence: str
    statistics: str
    jsd_beta: float
    one_temperature: bool
    teacher_shares_temperature: bool
    logit_scale: float
    logit_softcap: float | None
    vocab_size: int
    precision: Precision
    sparse_tolerance: float | None
    sparse_max_columns: int | None
    top_k: int
    max_chunk_bytes: int | None
    group: str
    validate: bool
    backend: Backend


@dataclass(frozen=True, kw_only=True)
class Problem:
    """N tokens; the head may have more rows than the columns in use.

    Attributes:
        inputs: the (N,) vectors that the token loss reads and `token_weights`, in compute dtype.
        temperature: of log-probs, entropy and policy gradient; the KLs' student and reference
            side has `kl_temperature`, the teacher's `teacher_temperature`.
        weight_grad_out: accumulator that takes the head's gradient in the caller's stead.
    """

    student: Tensor  # (N, D)
    weight: Tensor  # (V', D)
    bias: Tensor | None  # (V',)
    teacher: Side | None
    reference: Side | None
    targets: Tensor | None  # (N,) int64
    inputs: Mapping[str, Tensor]  # (N,) each
    temperature: Tensor  # (N,)
    kl_temperature: Tensor  # (N,)
    teacher_temperature: Tensor  # (N,)
    weight_grad_out: Tensor | None  # (V', D) fp32
    settings: Settings

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of logits, statistics and accumulation: fp32, or fp64 for fp64 inputs."""
        return self.temperature.dtype

    @functools.cached_property
    def loss(self) -> TokenLoss:
        """The loss as a function of statistics."""
        settings = self.settings
        if settings.loss == HSD_LOSS:
            return hsd_loss_from(settings.divergence, settings.loss_scalars)
        if settings.loss == LINEAR_LOSS:
            return LinearLoss(names=self.statistics)
        return find_token_loss(settings.loss)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that are computed."""
        return tuple(self.settings.statistics.split(","))

    @property
    def active(self) -> Tensor:
        """(N,) bool: rows that enter a GEMM at all."""
        return self.inputs["token_weights"] != 0

    @property
    def needs_teacher(self) -> Tensor:
        """(N,) bool: active rows whose KL to the teacher carries weight."""
        return self._carries(self.teacher, "kl_weights")

    @property
    def needs_reference(self) -> Tensor:
        """(N,) bool: active rows whose reference KL carries weight."""
        return self._carries(self.reference, "ref_weights")

    def _carries(self, side: Side | None, weights: str) -> Tensor:
        if side is None:
            return torch.zeros_like(self.active)
        if self.settings.loss != HSD_LOSS or weights not in self.inputs:
            return self.active
        return self.active & (self.inputs[weights] != 0)
