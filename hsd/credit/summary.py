"""The numbers of a whole export, gathered rollout by rollout in constant memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hsd.credit.moments import Mean
from hsd.credit.profiles import WINDOW, ContextProfile
from hsd.credit.records import RolloutCredit
from hsd.data.peers import expected_coverage


@dataclass
class _StepCounts:
    rollouts: int = 0
    correct: int = 0
    covered: int = 0  # failed, with a peer
    groups: float = 0.0


@dataclass
class CreditSummary:
    """Profiles per context, prefix lengths, coverage and information of all rollouts."""

    profiles: dict[str, ContextProfile] = field(default_factory=dict)
    kl: dict[str, Mean] = field(default_factory=dict)  # per-token mean of each rollout
    entropy: Mean = field(default_factory=Mean)
    length: Mean = field(default_factory=Mean)
    prefix_lengths: Counter[int] = field(default_factory=Counter)
    prefix_share: Mean = field(default_factory=Mean)
    steps: dict[int, _StepCounts] = field(default_factory=dict)

    def add(self, rollout: RolloutCredit) -> None:
        """Takes one rollout in."""
        covered = not rollout.correct and rollout.divergence is not None
        counts = self.steps.setdefault(rollout.step, _StepCounts())
        counts.rollouts += 1
        counts.correct += rollout.correct
        counts.covered += covered
        counts.groups += 1 / rollout.group_size
        self.length.add(len(rollout.token_ids))
        self.entropy.add(float(rollout.entropy.mean()))
        for name, context in rollout.contexts.items():
            self.kl.setdefault(name, Mean()).add(float(context.kl.mean()))
        if not covered or rollout.divergence is None:
            return
        self.prefix_lengths[rollout.divergence] += 1
        self.prefix_share.add(rollout.divergence / len(rollout.token_ids))
        for name, context in rollout.contexts.items():
            self.profiles.setdefault(name, ContextProfile()).add(
                context.credit,
                divergence=rollout.divergence,
                tokens=rollout.tokens,
                pass_rate=rollout.group_correct / rollout.group_size,
            )

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; the keys are explained in docs/credit.md."""
        rollouts = sum(counts.rollouts for counts in self.steps.values())
        correct = sum(counts.correct for counts in self.steps.values())
        return {
            "rollouts": rollouts,
            "correct": correct,
            "failed_with_peer": sum(counts.covered for counts in self.steps.values()),
            "window": WINDOW,
            "contexts": {
                name: {
                    **self.profiles.get(name, ContextProfile()).to_dict(),
                    "kl": kl.to_dict(),
                }
                for name, kl in self.kl.items()
            },
            "prefix_length": {
                "counts": sorted(self.prefix_lengths.items()),
                "share_of_rollout": self.prefix_share.to_dict(),
            },
            "coverage": [_coverage(step, counts) for step, counts in sorted(self.steps.items())],
            "information": self._information(rollouts, correct),
        }

    def _information(self, rollouts: int, correct: int) -> dict[str, Any]:
        """Nats per token: what an outcome reward can tell at most, and what bounds a context.

        A binary reward of pass rate p tells at most H(p) nats about a rollout. The mean over
        contexts of KL(q || p) is a mutual information where p is the mean of the q, and then at
        most the entropy of p.
        """
        ceiling = None
        if rollouts and self.length.mean:
            ceiling = binary_entropy(correct / rollouts) / self.length.mean
        return {
            "reward_ceiling": ceiling,
            "entropy": self.entropy.to_dict(),
            "length": self.length.to_dict(),
        }


def binary_entropy(probability: float) -> float:
    """-p log p - (1 - p) log(1 - p), nats."""
    parts = (probability, 1.0 - probability)
    return -sum(part * math.log(part) for part in parts if part > 0)


def _coverage(step: int, counts: _StepCounts) -> dict[str, Any]:
    pass_rate = counts.correct / counts.rollouts
    group_size = round(counts.rollouts / counts.groups)
    return {
        "step": step,
        "rollouts": counts.rollouts,
        "group_size": group_size,
        "pass_rate": pass_rate,
        "observed": counts.covered / counts.rollouts,
        "expected": expected_coverage(pass_rate, group_size),
    }
