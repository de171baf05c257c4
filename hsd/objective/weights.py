"""Which tokens of a rollout its teacher speaks to."""

from __future__ import annotations

from typing import Literal


def window_mask(
    length: int, *, correct: bool, divergence: int | None, window: int | Literal["none"]
) -> list[bool]:
    """Tokens that carry weight under the divergence window (an extension; off in the paper).

    After the slip of a failed rollout its prefix is wrong, and the teacher, which has seen the
    right path, pulls toward tokens that do not follow from it. So only tokens up to tau + window
    count; a failed rollout without a peer has no tau and counts nowhere.

    Args:
        length: tokens of the rollout.
        correct: a correct rollout keeps all tokens.
        divergence: tau, where the rollout leaves its peer; None without a peer.
        window: tokens past tau that count; "none" switches the window off.
    """
    if correct or window == "none":
        return [True] * length
    kept = 0 if divergence is None else divergence + window + 1
    return [position < kept for position in range(length)]
