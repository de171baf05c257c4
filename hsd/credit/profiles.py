"""Where the credit of failing rollouts lies: profile around tau, shares, peak and floor.

tau is the first index where a rollout differs from its peer, d = position - tau. Everything is over
failing rollouts with a successful peer, and intervals are over rollouts. Source: the figures of
arXiv 2606.15576, whose denominator is a window of about 80 tokens around tau.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hsd.credit.moments import Mean, Ratio
from hsd.credit.records import Floats
from hsd.credit.tokens import TOKEN_CLASSES, token_class

WINDOW = 40
"""Tokens on each side of tau that profile and shares look at."""
WITHIN = (2, 4, 8, 16, 32)
"""w of the shares within +-w."""
FLOOR_BEYOND = 20
"""The floor is the mean over the window's tokens that are further than this from tau."""
PASS_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Edges of the difficulty split: bins are (low, high] in the group's pass rate."""
_SPLIT_WITHIN = 8


@dataclass
class ContextProfile:
    """What accumulates for one teacher context."""

    offsets: list[Mean] = field(default_factory=lambda: [Mean() for _ in range(2 * WINDOW + 1)])
    shares: list[Ratio] = field(default_factory=lambda: [Ratio() for _ in WITHIN])
    tokens_within: list[Ratio] = field(default_factory=lambda: [Ratio() for _ in WITHIN])
    floor: Mean = field(default_factory=Mean)
    before: Mean = field(default_factory=Mean)
    peak_by_difficulty: list[Mean] = field(default_factory=lambda: [Mean() for _ in PASS_RATES[1:]])
    share_by_difficulty: list[Ratio] = field(
        default_factory=lambda: [Ratio() for _ in PASS_RATES[1:]]
    )
    class_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOKEN_CLASSES, 0))
    class_credit: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(TOKEN_CLASSES, 0.0)
    )

    def add(
        self, credit: Floats, *, divergence: int, tokens: tuple[str, ...], pass_rate: float
    ) -> None:
        """One failing rollout with a peer.

        Args:
            credit: (n,) A, nats.
            divergence: tau, 0 to n.
            tokens: n texts.
            pass_rate: of its group.
        """
        size = np.abs(credit)
        distance = np.arange(len(size)) - divergence
        near = np.abs(distance) <= WINDOW
        for offset, value in zip(distance[near], size[near], strict=True):
            self.offsets[offset + WINDOW].add(float(value))
        self._add_shares(size, distance, near, pass_rate)
        for mean, chosen in (
            (self.floor, near & (np.abs(distance) > FLOOR_BEYOND)),
            (self.before, near & (distance < 0)),
        ):
            if chosen.any():
                mean.add(float(size[chosen].mean()))
        for text, value in zip(tokens, size, strict=True):
            kind = token_class(text)
            self.class_tokens[kind] += 1
            self.class_credit[kind] += float(value)

    def _add_shares(self, size: Floats, distance: Any, near: Any, pass_rate: float) -> None:
        whole, width = float(size[near].sum()), float(near.sum())
        for within, share, tokens in zip(WITHIN, self.shares, self.tokens_within, strict=True):
            inside = np.abs(distance) <= within
            share.add(float(size[inside].sum()), whole)
            tokens.add(float(inside.sum()), width)
        split = int(np.searchsorted(PASS_RATES, pass_rate, side="left")) - 1
        at_tau = size[distance == 0]
        if len(at_tau):  # a rollout that is a prefix of its peer has no token at tau
            self.peak_by_difficulty[split].add(float(at_tau[0]))
        inside = np.abs(distance) <= _SPLIT_WITHIN
        self.share_by_difficulty[split].add(float(size[inside].sum()), whole)

    @property
    def decay(self) -> int | None:
        """The first d > 0 where the profile is within a tenth of the way from floor to peak."""
        peak, floor = self.offsets[WINDOW].mean, self.floor.mean
        if peak is None or floor is None:
            return None
        for distance, offset in enumerate(self.offsets[WINDOW + 1 :], start=1):
            if offset.mean is not None and offset.mean <= floor + 0.1 * (peak - floor):
                return distance
        return None

    def to_dict(self) -> dict[str, Any]:
        """The numbers behind the figures, as JSON values."""
        total = sum(self.class_credit.values())
        return {
            "profile": [
                {"distance": i - WINDOW, **offset.to_dict()}
                for i, offset in enumerate(self.offsets)
                if offset.count
            ],
            "peak": self.offsets[WINDOW].to_dict(),
            "floor": {**self.floor.to_dict(), "beyond": FLOOR_BEYOND},
            "before": self.before.to_dict(),
            "decay": self.decay,
            "shares": [
                {
                    "within": within,
                    "window": WINDOW,
                    "share": share.ratio,
                    "half_width": share.half_width,
                    "token_share": tokens.ratio,
                }
                for within, share, tokens in zip(
                    WITHIN, self.shares, self.tokens_within, strict=True
                )
            ],
            "difficulty": [
                {
                    "above": low,
                    "up_to": high,
                    "rollouts": share.count,
                    "peak": peak.to_dict(),
                    "within": _SPLIT_WITHIN,
                    "share": share.ratio,
                    "half_width": share.half_width,
                }
                for low, high, peak, share in zip(
                    PASS_RATES[:-1],
                    PASS_RATES[1:],
                    self.peak_by_difficulty,
                    self.share_by_difficulty,
                    strict=True,
                )
            ],
            "classes": {
                kind: {
                    "tokens": self.class_tokens[kind],
                    "mean": _quotient(self.class_credit[kind], self.class_tokens[kind]),
                    "share": _quotient(self.class_credit[kind], total),
                }
                for kind in TOKEN_CLASSES
            },
        }


def _quotient(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def bars(context: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """(distance, mean, half width) of the profile of `to_dict`, where enough rollouts reach.

    A distance that fewer than a tenth of them reach says more about one rollout than about all.
    An unknown half width is 0.
    """
    most = max((p["count"] for p in context["profile"]), default=0)
    return [
        (p["distance"], p["mean"], p["half_width"] or 0.0)
        for p in context["profile"]
        if 10 * p["count"] >= most
    ]
