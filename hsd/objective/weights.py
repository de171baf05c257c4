"""Token weights: which tokens of a rollout count, and how much."""

from __future__ import annotations

from collections.abc import Sequence
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


def sequence_weights(
    loss_mask: Sequence[bool], kept: Sequence[bool], *, group_size: int, questions: int
) -> tuple[float, ...]:
    """The paper's mean: over a rollout's own tokens, over its group, over the questions.

    Tokens that `kept` leaves out weigh nothing; the mean stays one over all tokens of the loss
    mask, so that a window does not make its few tokens count for more.

    Args:
        loss_mask: tokens that the policy chose.
        kept: tokens that the objective keeps.
        group_size: G.
        questions: of the whole step, over all ranks.
    """
    own = sum(loss_mask)
    share = 1.0 / (own * group_size * questions) if own else 0.0
    return tuple(
        share if chosen and keep else 0.0 for chosen, keep in zip(loss_mask, kept, strict=True)
    )
