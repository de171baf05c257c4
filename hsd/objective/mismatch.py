"""Corrections for rollouts that the engine drew from a slightly other policy than the trainer's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def mismatch_factors(
    log_ratio: Tensor,
    lengths: Sequence[int],
    own: Tensor,
    *,
    importance_cap: float | Literal["none"],
    sequence_mask: float | Literal["none"],
) -> Tensor:
    """(N,) factors of the tokens' weights, held constant.

    A truncated importance weight (Ionides 2008), min(exp(log_ratio), cap), makes the mean over
    sampled tokens one over the trainer's policy, at a bias where it is cut. A sequence mask drops
    a rollout whose geometric mean ratio is out of [1 / mask, mask]: the engine's numbers, or its
    weights, were other ones there.

    Args:
        log_ratio: (N,) the trainer's log-prob of each token minus the engine's, nats; anything
            where `own` is false.
        lengths: tokens of each rollout, one behind the other.
        own: (N,) bool, tokens that carry weight; the mean is over these.
        importance_cap: largest importance weight, or "none" for no such weight.
        sequence_mask: bound of the mean ratio, or "none".
    """
    log_ratio = torch.where(own, log_ratio, 0.0)
    factors = torch.ones_like(log_ratio)
    if importance_cap != "none":
        factors = torch.exp(log_ratio).clamp(max=importance_cap)
    if sequence_mask != "none":
        counts = torch.tensor(lengths, device=own.device)
        rollout = torch.repeat_interleave(counts)  # (N,) which rollout it is of
        empty = torch.zeros(len(lengths), device=own.device)
        sums = empty.index_add(0, rollout, log_ratio)
        mean = sums / empty.index_add(0, rollout, own.float()).clamp(min=1)
        factors = factors * (mean.abs() <= math.log(sequence_mask))[rollout]
    return factors
