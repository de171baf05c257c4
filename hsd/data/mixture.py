"""Mixtures of reasoning-gym's generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

from hsd.data import gym
from hsd.data.questions import Question
from hsd.data.splits import cut
from hsd.data.task_configs import ReasoningGymMixtureTask
from hsd.data.verify import Verifier


def generate(
    config: ReasoningGymMixtureTask,
) -> tuple[dict[str, tuple[Question, ...]], Verifier]:
    """The three splits, in each the datasets in proportion to their weights, shuffled.

    Raises:
        ValueError: as hsd.data.gym.generate; or a weight gives a dataset no training
            question.
    """
    sizes = {
        "train": config.train_questions,
        "validation": config.validation_questions,
        "heldout": config.heldout_questions,
    }
    shares = {split: proportional(config.weights, size) for split, size in sizes.items()}
    mixed: dict[str, list[Question]] = {split: [] for split in sizes}
    verifiers: dict[str, Verifier] = {}
    for name, weight in config.weights.items():
        if shares["train"][name] == 0:
            found = f"{weight!r}, which gives it none of {config.train_questions} questions"
            raise ValueError(f"task.weights.{name}: found {found}, expected more")
        questions, verifiers[name] = gym.generate(
            dataset=name,
            options=config.options.get(name, {}),
            seed=config.seed,
            count=sum(shares[split][name] for split in sizes),
        )
        parts = cut(
            questions, heldout=shares["heldout"][name], validation=shares["validation"][name]
        )
        for split, own in parts.items():
            mixed[split].extend(own)
    for split, questions in mixed.items():
        random.Random(f"mixture/{config.seed}/{split}").shuffle(questions)
    splits = {split: tuple(questions) for split, questions in mixed.items()}
    return splits, partial(_verify, verifiers)


def proportional(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Integers in proportion to weights that sum to total (largest remainders first)."""
    whole = sum(weights.values())
    exact = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _verify(verifiers: Mapping[str, Verifier], question: Question, response: str) -> bool:
    """Ids of questions begin with the name of their dataset."""
    return verifiers[question.id.partition(":")[0]](question, response)
