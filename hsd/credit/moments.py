"""Running means and ratios with normal 95 % intervals, in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Mean:
    """The mean of independent observations."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float | None:
        """None without observations."""
        return self.total / self.count if self.count else None

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval; None with fewer than two observations."""
        if self.count < 2:
            return None
        spread = self.squares - self.total**2 / self.count
        return 1.96 * math.sqrt(max(0.0, spread) / (self.count - 1) / self.count)

    def to_dict(self) -> dict[str, float | int | None]:
        return {"count": self.count, "mean": self.mean, "half_width": self.half_width}


@dataclass
class Ratio:
    """The ratio of two sums over independent pairs; its interval is linearised (delta method)."""

    count: int = 0
    parts: float = 0.0
    wholes: float = 0.0
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    def add(self, part: float, whole: float) -> None:
        self.count += 1
        self.parts += part
        self.wholes += whole
        self.products += (part * part, part * whole, whole * whole)

    @property
    def ratio(self) -> float | None:
        """None where the wholes sum to zero."""
        return self.parts / self.wholes if self.wholes else None

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval; None with fewer than two pairs."""
        ratio = self.ratio
        if ratio is None or self.count < 2:
            return None
        residual = float(self.products @ (1.0, -2.0 * ratio, ratio * ratio))
        variance = max(0.0, residual) * self.count / (self.count - 1)
        return 1.96 * math.sqrt(variance) / self.wholes
