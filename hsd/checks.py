"""The check behind every error of a configuration."""

from __future__ import annotations

import math
from pathlib import PurePath


def require(name: str, value: object, condition: bool, expected: str) -> None:
    """Raises where a value of a configuration is not finite, or a condition on it does not hold.

    Raises:
        ValueError: `name: found value, expected ...`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: found {value!r}, expected a finite number")
    if not condition:
        found = str(value) if isinstance(value, PurePath) else value
        raise ValueError(f"{name}: found {found!r}, expected {expected}")
