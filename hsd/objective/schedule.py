"""Schedules of scalars: a number, or a line through points."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeAlias

Scalar: TypeAlias = float | tuple[tuple[int, float], ...]
"""A number for the whole run, or points (step, value) in the order of their steps."""


def value_at(scalar: Scalar, step: int) -> float:
    """The value at a step (from 0): linear between points, constant before and behind them."""
    if isinstance(scalar, int | float):
        return float(scalar)
    for (start, low), (end, high) in pairwise(scalar):
        if start <= step < end:
            return low + (high - low) * (step - start) / (end - start)
    return scalar[0][1] if step < scalar[0][0] else scalar[-1][1]


def reaches_zero(scalar: Scalar) -> bool:
    """Whether a scalar that is never negative is 0 at some step."""
    if isinstance(scalar, int | float):
        return scalar == 0
    return any(value == 0 for _, value in scalar)


def require_scalar(name: str, scalar: Scalar, *, highest: float = math.inf) -> None:
    """Checks a scalar of a configuration.

    Raises:
        ValueError: a value is not finite or out of its range, there is no point, or steps do not
            increase.
    """
    points = ((0, scalar),) if isinstance(scalar, int | float) else scalar
    if not points:
        raise ValueError(f"{name}: found no point, expected a number or points (step, value)")
    for _, value in points:
        if not math.isfinite(value):
            raise ValueError(f"{name}: found {value!r}, expected a finite number")
        if not 0 <= value <= highest:
            raise ValueError(f"{name}: found {value!r}, expected 0 to {highest:g}")
    steps = [step for step, _ in points]
    if steps[0] < 0 or any(second <= first for first, second in pairwise(steps)):
        raise ValueError(f"{name}: found steps {steps}, expected increasing ones from 0 on")
