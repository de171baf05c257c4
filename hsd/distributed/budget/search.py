"""The longest responses that fit."""

from __future__ import annotations

from collections.abc import Callable

GRANULE = 512


def longest_response(slack: Callable[[int], int], *, start: int, most: int) -> int:
    """The largest multiple of `GRANULE` whose slack is not negative; 0 if there is none.

    Args:
        slack: response tokens -> bytes that are left; falls with the tokens, nearly on a line,
            which saves most of a bisection's calls.
        start: tokens to try first.
        most: tokens beyond which nothing is tried.
    """
    fits: tuple[int, int] | None = None  # (granules, slack)
    fails: tuple[int, int] | None = None
    top = most // GRANULE
    trial = min(top, max(1, start // GRANULE))
    while True:
        left = slack(trial * GRANULE)
        if left >= 0:
            fits = (trial, left)
        else:
            fails = (trial, left)
        if fits and (fits[0] == top or (fails and fails[0] - fits[0] <= 1)):
            return fits[0] * GRANULE
        if not fits and trial == 1:
            return 0
        if fits and fails:
            share = fits[1] / (fits[1] - fails[1])
            trial = fits[0] + int(share * (fails[0] - fits[0]))
            trial = min(max(trial, fits[0] + 1), fails[0] - 1)
        else:
            trial = min(top, trial * 2) if fits else trial // 2
