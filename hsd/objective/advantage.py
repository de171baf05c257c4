"""From the rewards of a group to the advantages of its rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

_EPSILON = 1e-6  # beside the standard deviation: a group of equal rewards has advantages of zero


def shaped_rewards(
    correct: Sequence[bool],
    lengths: Sequence[int],
    *,
    overlong_tokens: int,
    overlong_penalty: float,
    max_new_tokens: int,
) -> list[float]:
    """1 for a success, 0 for a failure, less what a rollout close to the limit loses.

    Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13): none up to
    max_new_tokens - overlong_tokens, from there linearly to the whole penalty at max_new_tokens.
    DAPO has rewards of 1 and -1 and a penalty of 1: on rewards of 1 and 0 that is 1/2.

    Args:
        correct, lengths: of each rollout of a group; lengths in tokens.
    """
    start = max_new_tokens - overlong_tokens
    rewards = []
    for success, length in zip(correct, lengths, strict=True):
        excess = (length - start) / overlong_tokens if length > start else 0.0
        rewards.append(float(success) - overlong_penalty * excess)
    return rewards


def no_advantages(rewards: Sequence[float]) -> list[float]:
    return [0.0] * len(rewards)


def centred_advantages(rewards: Sequence[float]) -> list[float]:
    """R_i - mean(R) (Dr. GRPO, arXiv 2503.20783)."""
    mean = statistics.fmean(rewards)
    return [reward - mean for reward in rewards]


def standardised_advantages(rewards: Sequence[float]) -> list[float]:
    """(R_i - mean(R)) / std(R), with the deviation of a sample (GRPO, arXiv 2402.03300)."""
    deviation = statistics.stdev(rewards)
    return [centred / (deviation + _EPSILON) for centred in centred_advantages(rewards)]


ADVANTAGES: Mapping[str, Callable[[Sequence[float]], list[float]]] = MappingProxyType(
    {
        "none": no_advantages,
        "centred": centred_advantages,
        "standardised": standardised_advantages,
    }
)
"""From the rewards of a group to one advantage per rollout, for all of its tokens."""
