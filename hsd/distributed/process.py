"""Data parallelism by processes: each rank has a share of the questions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Item = TypeVar("Item")
_NOTHING: Any = object()
# What is summed in host memory (counts, offloaded gradients) goes by gloo.
_BACKENDS = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the others.

    Attributes:
        rank: 0 writes the files and talks to the terminal.
        size: number of processes.
    """

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """Among the ranks of this machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    @property
    def local_size(self) -> int:
        """Ranks of this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def share_of_cores(self) -> int:
        """The cores of this machine for one of its ranks, at least one."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every size-th item, from the rank's own on."""
        return list(items[self.rank :: self.size])

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The shares of all ranks, in the order of the whole that `share` dealt out."""
        if self.size == 1:
            return list(items)
        shares: list[Any] = [None] * self.size
        dist.all_gather_object(shares, list(items))
        rounds = itertools.zip_longest(*shares, fillvalue=_NOTHING)
        return [item for each in rounds for item in each if item is not _NOTHING]

    def main_first(self, action: Callable[[], Item]) -> Item:
        """Runs `action` on the main rank, then on the others, which find its results cached."""
        if not self.is_main:
            self.barrier()
        result = action()
        if self.is_main:
            self.barrier()
        return result

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, values: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums gradients over the ranks: the losses already hold the global normaliser.

        Every rank takes part for every trained parameter; one without a gradient adds zero.
        """
        if self.size == 1:
            return
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def join_world() -> World:
    """Joins the processes that torchrun started; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(rank=0, size=1)
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(_BACKENDS)
    return World(rank=dist.get_rank(), size=size)


def leave_world() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sharding_mesh() -> DeviceMesh:
    """All ranks, in one dimension, on their GPUs where there are some; a process alone is one."""
    if not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_BACKENDS, store=alone, rank=0, world_size=1)
    return init_device_mesh(sharding_device().type, (dist.get_world_size(),))


def sharding_device() -> torch.device:
    """Where a sharded model is, and what runs beside it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
