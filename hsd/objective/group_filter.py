"""Which groups of rollouts enter the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType


def every_group(rewards: Sequence[bool]) -> bool:
    return True


def mixed_group(rewards: Sequence[bool]) -> bool:
    """Both outcomes: the others have no advantage to learn from (DAPO, arXiv 2503.14476)."""
    return any(rewards) and not all(rewards)


GROUP_FILTERS: Mapping[str, Callable[[Sequence[bool]], bool]] = MappingProxyType(
    {"all": every_group, "mixed": mixed_group}
)
"""From the success of each rollout of a group to whether the group is kept."""
