"""What one rank of a machine does for all of its ranks, such as asking the servers they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from hsd.distributed.process import World
from hsd.rollout.protocol import EngineError

Item = TypeVar("Item")
Result = TypeVar("Result")

# The others wait while the first rank samples a step or starts a server; both have limits of their
# own, and where a rank dies torchrun ends the rest.
_TIMEOUT = timedelta(days=7)


class Sharing:
    """The ranks of a machine, of which the first acts for all; or each rank for itself.

    Every rank makes the same calls, also one that has nothing to ask for: each call is a collective
    of the machine's ranks, on the host. What fails with an EngineError on the first rank fails with
    it on all.

    Args:
        shared: the first rank acts; else each rank does, and nothing is exchanged.
    """

    def __init__(self, world: World, *, shared: bool) -> None:
        self._first = world.rank - world.local_rank
        self.acts = not shared or world.local_rank == 0
        self._group: Any = None
        if not shared or world.size == 1:
            return
        firsts = world.gather([self._first])
        # Every rank takes part in making every group.
        for first in sorted(set(firsts)):
            members = [rank for rank, its_first in enumerate(firsts) if its_first == first]
            group = dist.new_group(members, backend="gloo", timeout=_TIMEOUT)
            if first == self._first:
                self._group = group

    def map(
        self, items: Sequence[Item], action: Callable[[list[Item]], list[Result]]
    ) -> list[Result]:
        """One call of `action` with the items of all ranks, on the one that acts; own results.

        Args:
            action: from items to a result for each, in order.

        Raises:
            EngineError: of the action, on every rank.
        """
        if self._group is None:
            return action(list(items))
        size = dist.get_world_size(self._group)
        shares: list[Any] | None = [None] * size if self.acts else None
        dist.gather_object(list(items), shares, dst=self._first, group=self._group)
        answers: list[Any] | None = None
        failure: EngineError | None = None
        if shares is not None:
            try:
                results = iter(action([item for share in shares for item in share]))
                answers = [[next(results) for _ in share] for share in shares]
            except EngineError as error:
                answers, failure = [str(error)] * size, error
        own: list[Any] = [None]
        dist.scatter_object_list(own, answers, src=self._first, group=self._group)
        if isinstance(own[0], str):
            raise failure or EngineError(own[0])
        found: list[Result] = own[0]
        return found

    def do(self, action: Callable[[], None]) -> None:
        """`action` on the rank that acts; the others wait for its end.

        Raises:
            EngineError: of the action, on every rank.
        """

        def once(_: list[None]) -> list[None]:
            action()
            return []

        self.map([], once)
