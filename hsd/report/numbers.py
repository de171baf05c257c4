"""Accuracy over questions and seeds, and how a run's numbers moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsd.report.runs import Record, Run
from hsd.scores import half_width, pass_at_k


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over seeds and questions.
        half_width: of the 95 % interval over questions, of the mean over seeds.
        spread: standard deviation over seeds; None for one seed.
    """

    mean: float
    half_width: float
    spread: float | None


def per_question(evaluation: Record, k: int) -> Tensor:
    """(Q,) unbiased pass@k of each question; k = 1 is the question's avg@n.

    Raises:
        ValueError: the evaluation has fewer than k samples.
    """
    counts = torch.tensor(evaluation["correct_per_question"])
    correct = torch.arange(evaluation["samples"]) < counts[:, None]  # (Q, n)
    return pass_at_k(correct, k)


def accuracy(evaluations: Sequence[Record], k: int) -> Estimate:
    """pass@k of evaluations on the same questions, one per seed."""
    return _estimate([per_question(each, k) for each in evaluations])


def change(before: Sequence[Record], after: Sequence[Record], k: int) -> Estimate:
    """Change of pass@k, paired by question and seed."""
    return _estimate(
        [per_question(b, k) - per_question(a, k) for a, b in zip(before, after, strict=True)]
    )


def _estimate(seeds: Sequence[Tensor]) -> Estimate:
    if len({len(each) for each in seeds}) > 1:
        raise ValueError("evaluation: found different numbers of questions, expected the same ones")
    table = torch.stack(list(seeds))  # (seeds, Q)
    means = table.mean(1)
    return Estimate(
        mean=float(table.mean()),
        half_width=half_width(table.mean(0)),
        spread=float(means.std()) if len(seeds) > 1 else None,
    )


def series(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    """(step, value) where the value is a finite number."""
    found = []
    for record in records:
        value = record.get(key)
        if type(value) is int and abs(value) < 2**1000:  # JSON has larger ones than a float
            value = float(value)
        if type(value) is float and math.isfinite(value):
            found.append((int(record["step"]), value))
    return found


def ends(records: Sequence[Record], key: str) -> tuple[float, float] | None:
    """Mean of a number over the first and over the last steps: a quarter of them, 1 to 10.

    None where fewer than two steps have it.
    """
    values = [value for _, value in series(records, key)]
    if len(values) < 2:
        return None
    width = min(10, max(1, len(values) // 4))
    return sum(values[:width]) / width, sum(values[-width:]) / width


def step_seconds(run: Run) -> float | None:
    """Mean seconds of a step, sampling and update."""
    seconds = [_seconds(step) for step in run.steps]
    return sum(seconds) / len(seconds) if seconds else None


def evaluation_within(run: Run, seconds: float) -> tuple[Record, float] | None:
    """The run's last evaluation at most that many seconds of steps after its start.

    Returns:
        the evaluation, and the seconds of the steps before it.
    """
    best = None
    for evaluation in run.evaluations:
        spent = sum(_seconds(step) for step in run.steps if step["step"] <= evaluation["step"])
        if spent <= seconds:
            best = evaluation, spent
    return best


def training_seconds(run: Run) -> float:
    """Seconds of all its steps, sampling and update; evaluations are not in it."""
    return sum(_seconds(step) for step in run.steps)


_TIMED = ("rollout_seconds", "update_seconds")


def _seconds(step: Record) -> float:
    return sum(value for key in _TIMED for _, value in series([step], key))
