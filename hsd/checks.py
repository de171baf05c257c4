"""The checks behind the errors of a configuration."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePath


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


def require_folder(name: str, path: Path) -> None:
    """Raises where a folder can be neither written into nor made; changes nothing.

    Raises:
        ValueError: `name: found path, expected ...`.
    """
    place = path.absolute()
    try:
        while not place.exists():
            place = place.parent
        usable = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a parent that must not be looked into, a name that is too long
        usable = False
    require(name, path, usable, "a folder that can be written, or made")
