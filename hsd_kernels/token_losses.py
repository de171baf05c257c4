"""Losses as functions of per-token statistics: plain arithmetic on (C,) vectors, no vocabulary.

A token loss takes the statistics of `hsd_kernels.statistics.named_statistics` and the per-token
inputs of its call, and returns one value per token; the caller sums them. It must be elementwise
over tokens: chunks of rows are passed to it one at a time. Both backends and the dense reference
call the same function, and torch.func differentiates it by the statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class HsdLoss:
    """The scalars of the HSD objective (arXiv 2606.15576, equations 10 and 13) and its companions.

    Attributes:
        divergence: the statistic that pulls the student to the teacher; None without a teacher.
        divergence_scale: 1, or 1/(b(1-b)) for the "scaled" jsd convention.
        kl_coef, ref_coef, pg_coef, entropy_coef: factors of the four terms.
        token_kl_cap: nats; a token's KL above it is scaled down to it, direction kept.
        clip_range: (low, high) of the importance ratio.
    """

    divergence: Divergence | None
    divergence_scale: float = 1.0
    kl_coef: float = 1.0
    ref_coef: float = 0.0
    pg_coef: float = 1.0
    entropy_coef: float = 0.0
    token_kl_cap: float | None = None
    clip_range: tuple[float, float] = (0.2, 0.2)

    def __call__(self, statistics: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(C,) w * (kl_coef w_kl KL + ref_coef w_ref R + pg_coef w_pg pg - entropy_coef H)."""
        total = torch.zeros_like(inputs["token_weights"])
        if self.divergence is not None and self.kl_coef != 0:
            weights = inputs.get("kl_weights")
            kl = self.divergence_scale * _computed(statistics[self.divergence], weights)
            if self.token_kl_cap is not None:
                kl = kl * (self.token_kl_cap / kl.detach().clamp(min=self.token_kl_cap))
            total = total + self.kl_coef * _weighted(weights, kl)
        if self.ref_coef != 0:
            weights = inputs.get("ref_weights")
            ref_kl = _computed(statistics["ref_kl"], weights)
            total = total + self.ref_coef * _weighted(weights, ref_kl)
        if "advantages" in inputs and self.pg_coef != 0:
            surrogate = clipped_policy_gradient(
                statistics["logprob"],
                inputs.get("old_logprobs"),
                inputs["advantages"],
                clip_range=self.clip_range,
            )
            total = total + self.pg_coef * _weighted(inputs.get("pg_weights"), surrogate)
        if self.entropy_coef != 0:
            total = total - self.entropy_coef * statistics["entropy"]
        return inputs["token_weights"] * total


def _computed(statistic: Tensor, weights: Tensor | None) -> Tensor:
    """Zero for the NaN of rows that were not computed, because their weight is zero.

    Before any arithmetic: the derivative of what follows would be 0 * NaN.
    """
    if weights is None:
        return statistic
    return torch.where(weights == 0, torch.zeros_like(statistic), statistic)


def _weighted(weights: Tensor | None, value: Tensor) -> Tensor:
    return value if weights is None else weights * value


def clipped_policy_gradient(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    clip_range: tuple[float, float],
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(logprob - old_logprob).

    Without `old_logprob` the policy's own detached log-prob stands in: rho is 1 and the gradient
    is that of -A logprob. (PPO, arXiv 1707.06347, equation 7; asymmetric clip of DAPO.)
    """
    old = logprob.detach() if old_logprob is None else old_logprob
    ratio = torch.exp(logprob - old)
    low, high = clip_range
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
