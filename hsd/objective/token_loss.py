"""The policy gradient of a token: what the fused pass is given beside divergence and reference.

Each takes the log-probs of a micro-batch and says what the pass has to add. What depends on more
than one token, or on the teacher, is held constant and comes from a first pass without gradients;
the gradient is exact all the same, as each docstring shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rollouts of a micro-batch, one behind the other; N tokens in all.

    Attributes:
        lengths: tokens of each rollout.
        own: tokens that carry weight.
        distilled: tokens that have a teacher.
        logprob, teacher_logprob: of policy and teacher, nats, detached; None if not asked for.
    """

    lengths: Sequence[int]
    advantages: Tensor  # (N,)
    old_logprobs: Tensor  # (N,) of the policy that sampled
    own: Tensor  # (N,) bool
    distilled: Tensor  # (N,) bool
    logprob: Tensor | None  # (N,)
    teacher_logprob: Tensor | None  # (N,)


@dataclass(frozen=True, kw_only=True)
class TokenLossOptions:
    """The scalars of a token loss, at the step."""

    clip_range: tuple[float, float]
    teacher_mix: float
    teacher_clip: float


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """What the fused pass adds.

    Attributes:
        arguments: of `fused_hsd_loss`.
        constant: (N,) loss of tokens, before weights, that has no gradient.
        clipped: (N,) bool, tokens whose ratio is out of range where it matters; None if it follows
            from the ratio of each token.
    """

    arguments: Mapping[str, Any]
    constant: Tensor | None = None
    clipped: Tensor | None = None


def out_of_range(ratio: Tensor, advantages: Tensor, clip_range: tuple[float, float]) -> Tensor:
    """(N,) bool: where min(rho A, clip(rho, 1 - low, 1 + high) A) is the clipped one."""
    low, high = clip_range
    too_high, too_low = ratio > 1 + high, ratio < 1 - low
    return (too_high & (advantages > 0)) | (too_low & (advantages < 0))


def token_ratio(batch: TokenBatch, options: TokenLossOptions) -> PolicyGradient:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), rho the token's ratio (PPO; GRPO; DAPO)."""
    return PolicyGradient(
        arguments={
            "advantages": batch.advantages,
            "old_logprobs": batch.old_logprobs,
            "clip_range": options.clip_range,
        }
    )


def sequence_ratio(batch: TokenBatch, options: TokenLossOptions) -> PolicyGradient:
    """-min(s A, clip(s, 1 - low, 1 + high) A), s the geometric mean of a rollout's token ratios.

    GSPO, arXiv 2507.18071, equations 5 and 7. ds = s * (mean over the rollout of d logprob), so
    where the rollout is not clipped the gradient is that of -(s A) logprob with s A constant: the
    policy gradient of each token at ratio 1 and advantage s A, in the mean over the rollout. A
    clipped rollout has a value and no gradient.
    """
    log_ratio = _given(batch.logprob) - batch.old_logprobs
    log_ratio = torch.where(batch.own, log_ratio, 0)
    lengths = torch.tensor(batch.lengths, device=log_ratio.device)
    rollout = torch.repeat_interleave(lengths)  # (N,) which rollout it is of
    zeros = torch.zeros(len(lengths), device=log_ratio.device)
    sums = zeros.index_add(0, rollout, log_ratio)
    counts = zeros.index_add(0, rollout, batch.own.float())
    ratio = torch.exp(sums / counts.clamp(min=1))[rollout]  # (N,)
    clipped = out_of_range(ratio, batch.advantages, options.clip_range)
    low, high = options.clip_range
    bound = -ratio.clamp(1 - low, 1 + high) * batch.advantages
    return PolicyGradient(
        arguments={"advantages": torch.where(clipped, 0, ratio * batch.advantages)},
        constant=torch.where(clipped, bound, 0),
        clipped=clipped,
    )


def teacher_weighted(batch: TokenBatch, options: TokenLossOptions) -> PolicyGradient:
    """`token_ratio` with A' = A ((1 - l) + l clip(w, 1 - c, 1 + c)), w = (q / p)^sign(A).

    RLSD, arXiv 2604.03128: the reward says in which direction, the teacher how far. w is held
    constant: it is no part of what is differentiated. Tokens without a teacher keep A.
    """
    gap = _given(batch.teacher_logprob) - _given(batch.logprob)
    weight = torch.exp(torch.sign(batch.advantages) * gap)
    weight = weight.clamp(1 - options.teacher_clip, 1 + options.teacher_clip)
    mixed = (1 - options.teacher_mix) + options.teacher_mix * weight
    factor = torch.where(batch.distilled & batch.own, mixed, 1.0)
    return PolicyGradient(
        arguments={
            "advantages": factor * batch.advantages,
            "old_logprobs": batch.old_logprobs,
            "clip_range": options.clip_range,
        }
    )


def _given(logprob: Tensor | None) -> Tensor:
    if logprob is None:
        raise RuntimeError("this token loss is given no log-probs; add it to NEEDS_STATISTICS")
    return logprob


TokenLoss = Callable[[TokenBatch, TokenLossOptions], PolicyGradient]

TOKEN_LOSSES: Mapping[str, TokenLoss] = MappingProxyType(
    {
        "token_ratio": token_ratio,
        "sequence_ratio": sequence_ratio,
        "teacher_weighted": teacher_weighted,
    }
)
NEEDS_STATISTICS = frozenset({"sequence_ratio", "teacher_weighted"})
"""Those that read log-probs of the first pass, which the others do without."""
