"""From data to verdicts, by rules that are printed beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.evidence.plan import Comparison
from hsd.report.numbers import evaluation_within, per_question, training_seconds
from hsd.report.runs import Record, Run
from hsd.scores import half_width

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be tested at this scale"
NOT_RUN = "not run yet"
FEWEST_FAILURES = 200
FLAT = 0.1
"""Nats above the floor; the paper's flat profile runs from 0.05 to 0.12."""
# Two-sided 95 % points of Student's t by degrees of freedom; the normal one beyond.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    claim: str
    verdict: str
    numbers: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def more(difference: Interval) -> str:
    """Of the claim that a difference is above zero."""
    if difference.mean - difference.half_width > 0:
        return HOLDS
    return FAILS if difference.mean + difference.half_width < 0 else OPEN


def minus(a: Interval, b: Interval) -> Interval:
    """Their difference, as if they were independent."""
    return Interval(mean=a.mean - b.mean, half_width=math.hypot(a.half_width, b.half_width))


# Credit -------------------------------------------------------------------------------------

CREDIT_RULES = (
    f"Credit claims need at least {FEWEST_FAILURES} failing rollouts with a peer and compare two "
    "means with 95 % intervals over rollouts: they hold if the interval of the difference (as of "
    "independent means) lies above zero, do not hold if it lies below, and cannot be tested "
    f"otherwise. Flat means a peak less than {FLAT:g} nats above the floor. The floor is the mean "
    "more than 20 tokens from the divergence; where no rollout is that long, nothing that needs it "
    "can be tested."
)

Contexts = Mapping[str, Any]


def credit_verdicts(summary: Mapping[str, Any] | None) -> list[Verdict]:
    """The paper's claims on credit, from a summary.json; None where there is none yet."""
    verdicts = []
    for claim, judge in _CREDIT_CLAIMS:
        if summary is None:
            verdict, numbers = NOT_RUN, "-"
        elif summary["failed_with_peer"] < FEWEST_FAILURES:
            verdict, numbers = OPEN, f"{summary['failed_with_peer']} failing rollouts with a peer"
        else:
            verdict, numbers = judge(summary["contexts"])
        verdicts.append(Verdict(claim=claim, verdict=verdict, numbers=numbers))
    return verdicts


def _mean(context: Mapping[str, Any], key: str) -> Interval | None:
    value = context[key]
    if value["mean"] is None or value["half_width"] is None:
        return None
    return Interval(mean=value["mean"], half_width=value["half_width"])


def _share(context: Mapping[str, Any]) -> Interval:
    share = context["shares"][0]  # within +-2
    return Interval(mean=share["share"] or 0.0, half_width=share["half_width"] or math.inf)


def _peak_over_floor(contexts: Contexts) -> tuple[str, str]:
    peak, floor = (_mean(contexts["answer_peer"], key) for key in ("peak", "floor"))
    if peak is None or floor is None:
        return OPEN, f"peak {peak}, no token more than 20 from the divergence"
    return more(minus(peak, floor)), f"peak {peak}, floor {floor} nats"


def _decay(contexts: Contexts) -> tuple[str, str]:
    if _mean(contexts["answer_peer"], "floor") is None:
        return OPEN, "no floor to come back to"
    decay = contexts["answer_peer"]["decay"]
    seen = "not within 40 tokens" if decay is None else f"after {decay} tokens"
    return (HOLDS if decay is not None and decay <= 20 else FAILS), seen


def _answer_flat(contexts: Contexts) -> tuple[str, str]:
    peak, floor = (_mean(contexts["answer"], key) for key in ("peak", "floor"))
    if peak is None or floor is None:
        return OPEN, f"peak {peak}, no token more than 20 from the divergence"
    room = minus(Interval(mean=FLAT, half_width=0.0), minus(peak, floor))
    return more(room), f"peak {peak}, floor {floor} nats"


def _share_above(other: str) -> Callable[[Contexts], tuple[str, str]]:
    def judge(contexts: Contexts) -> tuple[str, str]:
        own, its = _share(contexts["answer_peer"]), _share(contexts[other])
        return more(minus(own, its)), f"{own} against {its}"

    return judge


def _peak_above_answer(contexts: Contexts) -> tuple[str, str]:
    own, its = (_mean(contexts[name], "peak") for name in ("answer_peer", "answer"))
    if own is None or its is None:
        return OPEN, "no peak"
    return more(minus(own, its)), f"{own} against {its} nats"


_CREDIT_CLAIMS: Sequence[tuple[str, Callable[[Contexts], tuple[str, str]]]] = (
    ("answer + peer: credit peaks at the divergence, above its floor", _peak_over_floor),
    ("answer + peer: credit is back at the floor within 20 tokens", _decay),
    ("answer alone: credit is flat, its peak is at its floor", _answer_flat),
    ("answer + peer has a higher peak than answer alone", _peak_above_answer),
    ("answer + peer has more of its credit within ±2 than answer alone", _share_above("answer")),
    (
        "answer + peer has more of its credit within ±2 than a success on another question",
        _share_above("other_prompt"),
    ),
)

# Learning -----------------------------------------------------------------------------------

LEARNING_RULES = (
    "Learning claims compare two recipes on the same questions and seeds. The interval is the "
    "wider of two 95 % intervals of the mean difference: over questions, of the mean over seeds, "
    "and over seeds (Student's t). A claim holds if the interval lies above zero, does not hold if "
    "it lies below, and cannot be tested otherwise. At equal time, each run counts with its last "
    "evaluation within the training time of the fastest run of the two recipes."
)


def learning_verdict(claim: Comparison, runs: Mapping[str, Sequence[Run]], seeds: int) -> Verdict:
    """Of one comparison.

    Args:
        runs: finished runs by the name of their job.
        seeds: that it takes.
    """
    better = {run.seed: run for run in runs[claim.better]}
    worse = better if claim.worse == "base" else {run.seed: run for run in runs[claim.worse]}
    common = sorted(better.keys() & worse.keys())
    if len(common) < seeds:
        ready = f"{len(common)} of {seeds} seeds" if common else "-"
        return Verdict(claim=claim.claim, verdict=NOT_RUN, numbers=ready)
    shortest = min(training_seconds(run) for run in (*better.values(), *worse.values()))
    limit = math.inf if claim.equal == "rollouts" else shortest
    pairs = [
        (
            _within(better[seed], limit),
            better[seed].evaluations[0] if claim.worse == "base" else _within(worse[seed], limit),
        )
        for seed in common
    ]
    k = min(each["samples"] for pair in pairs for each in pair) if claim.measure == "pass" else 1
    table = torch.stack([per_question(a, k) - per_question(b, k) for a, b in pairs])
    difference = interval(table)
    means = [
        sum(float(per_question(pair[side], k).mean()) for pair in pairs) / len(pairs)
        for side in (0, 1)
    ]
    name = f"pass@{k}" if claim.measure == "pass" else f"avg@{pairs[0][0]['samples']}"
    numbers = f"{name} {means[0]:.3f} against {means[1]:.3f}, difference {difference}"
    return Verdict(claim=claim.claim, verdict=more(difference), numbers=numbers)


def _within(run: Run, seconds: float) -> Record:
    """Its last evaluation within that training time; the first one, before training, always is."""
    found = evaluation_within(run, seconds)
    return run.evaluations[0] if found is None else found[0]


def interval(table: torch.Tensor) -> Interval:
    """Of the mean of (seeds, questions): the wider of those over questions and over seeds."""
    over_questions = half_width(table.mean(0))
    count = len(table)
    over_seeds = 0.0
    if count > 1:
        student = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else 1.96
        over_seeds = student * float(table.mean(1).std()) / math.sqrt(count)
    return Interval(mean=float(table.mean()), half_width=max(over_questions, over_seeds))
