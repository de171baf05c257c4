"""Vocabulary-parallel: ranks that hold consecutive rows of the head, and what they exchange.

Each rank reads its own columns of every token's row; parts of the statistics are gathered and
merged in the order of the ranks, and the gradient of the hidden states is summed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's columns of the vocabulary; the whole of it without a process group.

    Attributes:
        first: column of the vocabulary that its head's first row stands for.
        columns: columns in use here: 0 where the shard is all padding.
        largest: the most that any rank has, by which all of them plan alike.
        vocab_size: V, columns in use on all ranks.
        group: of the ranks, or None.
    """

    first: int
    columns: int
    largest: int
    vocab_size: int
    group: dist.ProcessGroup | None

    def gathered(self, part: Tensor) -> Tensor:
        """(1, ...) of each rank as (ranks, ...), in their order."""
        if self.group is None:
            return part
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

    def sum_(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def local_targets(self, targets: Tensor | None) -> Tensor | None:
        """Targets as columns of this shard, -1 where they lie in another."""
        if targets is None or self.group is None:
            return targets
        own = targets - self.first
        return torch.where((own >= 0) & (own < self.columns), own, -1)


def shard_of(group_name: str, rows: int, vocab_size: int, device: torch.device) -> Shard:
    """The shard of this rank.

    Args:
        group_name: of the process group, "" for none.
        rows: of this rank's head.
        vocab_size: columns in use of the whole vocabulary; 0 for all rows of all ranks.
        device: where collectives run.

    Raises:
        ValueError: vocab_size exceeds the rows of all ranks.
    """
    if not group_name:
        size = vocab_size or rows
        return Shard(first=0, columns=size, largest=size, vocab_size=size, group=None)
    resolve: Any = distributed_c10d
    group = resolve._resolve_process_group(group_name)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = rows
    dist.all_reduce(sizes, group=group)
    ends = sizes.cumsum(0).tolist()
    vocab_size = vocab_size or ends[-1]
    if vocab_size > ends[-1]:
        raise ValueError(
            f"vocab_size: found {vocab_size}, expected 1 to {ends[-1]}, rows of weight"
        )
    starts = [0, *ends[:-1]]
    used = [max(0, min(end, vocab_size) - start) for start, end in zip(starts, ends, strict=True)]
    rank = dist.get_rank(group)
    return Shard(
        first=starts[rank],
        columns=used[rank],
        largest=max(used),
        vocab_size=vocab_size,
        group=group,
    )
