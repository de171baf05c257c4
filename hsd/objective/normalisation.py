"""How the losses of tokens become the loss of a step: the weight of one token of each rollout.

All of them divide by numbers of the whole step, over all processes, so the gradient depends
neither on micro-batches nor on how questions are dealt out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What the mean of one update is over.

    Attributes:
        questions: groups, over all processes.
        tokens: of their rollouts, those that the policy chose, over all processes.
        max_new_tokens: the longest that a rollout can get.
    """

    questions: int
    tokens: int
    max_new_tokens: int


def sequence_mean(lengths: Sequence[int], totals: StepTotals) -> list[float]:
    """Over a rollout's tokens, its group, the questions (HSD, arXiv 2606.15576; GRPO)."""
    return [_share(length * len(lengths) * totals.questions) for length in lengths]


def token_mean(lengths: Sequence[int], totals: StepTotals) -> list[float]:
    """Over all tokens of a group, the questions (DAPO, arXiv 2503.14476, equation 8)."""
    return [_share(sum(lengths) * totals.questions)] * len(lengths)


def token_global_mean(lengths: Sequence[int], totals: StepTotals) -> list[float]:
    """Over all tokens of the step."""
    return [_share(totals.tokens)] * len(lengths)


def constant_mean(lengths: Sequence[int], totals: StepTotals) -> list[float]:
    """As `sequence_mean`, every rollout as long as the longest possible (Dr. GRPO, 2503.20783)."""
    return [_share(totals.max_new_tokens * len(lengths) * totals.questions)] * len(lengths)


def _share(count: int) -> float:
    return 1.0 / count if count else 0.0


NORMALISATIONS: Mapping[str, Callable[[Sequence[int], StepTotals], list[float]]] = MappingProxyType(
    {
        "sequence": sequence_mean,
        "token": token_mean,
        "token_global": token_global_mean,
        "constant": constant_mean,
    }
)
"""From the lengths of a group's rollouts, in tokens that the policy chose, to the weight of a token
of each. What a mask, a window or a missing teacher takes out stays in the count: a few tokens that
are left do not count for more."""
