"""Signs of collapse in one run. Each rule is stated with the alarm, so that it can be judged.

Steps are compared by `numbers.ends`: the mean over the first quarter of them (1 to 10 steps) with
the mean over the last.
"""

from __future__ import annotations

from collections.abc import Callable

from hsd.report.numbers import change, ends
from hsd.report.runs import Run

ENTROPY_FACTOR = 4.0
LENGTH_FACTOR = 2.0
REPETITION_RISE = 0.1

RULES = {
    "entropy": f"the policy's entropy fell to less than 1/{ENTROPY_FACTOR:g} of its start, "
    f"or rose to more than {ENTROPY_FACTOR:g} times of it",
    "length": f"responses became more than {LENGTH_FACTOR:g} times as long, or less than "
    f"1/{LENGTH_FACTOR:g}",
    "repetition": f"the share of repeated 4-grams rose by more than {REPETITION_RISE:g}",
    "diversity": "pass@k fell while avg@k rose; the fall lies outside its 95 % interval over "
    "questions, paired",
}


def alarms(run: Run) -> dict[str, str]:
    """The alarms that a run sets off: name of the rule -> what was seen."""
    found = {name: check(run) for name, check in _CHECKS.items()}
    return {name: seen for name, seen in found.items() if seen is not None}


def _ratio(run: Run, key: str, factor: float) -> str | None:
    both = ends(run.steps, key)
    if both is None or both[0] <= 0:
        return None
    first, last = both
    if first / factor <= last <= first * factor:
        return None
    return f"{key.replace('_', ' ')} {first:.3g} -> {last:.3g}"


def _entropy(run: Run) -> str | None:
    return _ratio(run, "entropy", ENTROPY_FACTOR)


def _length(run: Run) -> str | None:
    return _ratio(run, "response_length", LENGTH_FACTOR)


def _repetition(run: Run) -> str | None:
    """In the sampled rollouts, and in the evaluations of runs that record it only there."""
    for records in (run.steps, run.evaluations):
        both = ends(records, "repetition")
        if both is not None and both[1] - both[0] > REPETITION_RISE:
            return f"repeated 4-grams {both[0]:.1%} -> {both[1]:.1%}"
    return None


def _diversity(run: Run) -> str | None:
    if len(run.evaluations) < 2:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    k = min(first["samples"], last["samples"])
    single, several = change([first], [last], 1), change([first], [last], k)
    if not (single.mean > 0 and several.mean < -several.half_width):
        return None
    return f"pass@{k} {several.mean:+.3f} ± {several.half_width:.3f}, avg@{k} {single.mean:+.3f}"


_CHECKS: dict[str, Callable[[Run], str | None]] = {
    "entropy": _entropy,
    "length": _length,
    "repetition": _repetition,
    "diversity": _diversity,
}
