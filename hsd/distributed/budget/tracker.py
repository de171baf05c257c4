"""Memory, traffic and FLOP of code that runs on fake tensors.

`StepTracker` is a FakeTensorMode that follows the life of every storage. It sees what the code
itself allocates; what a kernel allocates inside is seen for the ops of hsd_kernels, whose fakes
allocate their workspace, and for no others.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed._tools.fake_collectives  # collectives on fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hsd.distributed.budget.flop import flop_of
from hsd.distributed.budget.kinds import KINDS, LASTING, LOSS, PARAMETERS, UNSHARDED

aten = torch.ops.aten


@dataclass(eq=False)
class Allocation:
    """A storage that lives, or lived at a peak. Its kind may become known after its birth."""

    nbytes: int
    kind: str
    on_host: bool = False


@dataclass
class Phase:
    """What happened between two calls of `StepTracker.enter`, on one GPU.

    Attributes:
        peak: bytes, the largest sum of living allocations.
        at_peak: the allocations that lived then.
        flop: of matrix products and attention.
        traffic: collective -> bytes that it puts into the output of this rank (all-gather) or takes
            from its input (reduce-scatter, all-reduce).
        collectives: collective -> calls.
    """

    name: str
    peak: int = 0
    at_peak: list[tuple[Allocation, int]] = field(default_factory=list)
    flop: float = 0.0
    traffic: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    def by_kind(self) -> dict[str, int]:
        """Bytes of each of KINDS at the peak; their sum is the peak."""
        sums = dict.fromkeys(KINDS, 0)
        for allocation, nbytes in self.at_peak:
            sums[allocation.kind] += nbytes
        return sums


class StepTracker(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Runs code on fake tensors and records each phase.

    Where the code asks a fake tensor for a value, the answer is that of the largest batch: sizes
    that depend on values are `rows`, numbers are 1 and truth values are true (every response token
    has weight, all masks are full, norms are finite); what `~` makes of a truth value is false.

    Args:
        rows: response tokens of a micro-batch.
        backend: of hsd_kernels, whose plan decides what the loss holds: "triton" for a GPU.
    """

    def __init__(self, *, rows: int, backend: str = "triton") -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.rows = rows
        self.backend = backend
        self.phases: list[Phase] = []
        self.current = 0
        self._phase = Phase("set-up")
        self._kind = PARAMETERS
        self._pending = False
        self._depth = 0
        self._in_loss = 0
        self._found: dict[int, tuple[weakref.KeyedRef[int, Any], Allocation]] = {}
        # Storages die in the middle of whatever, garbage collection too: only noted there.
        self._dead: deque[weakref.KeyedRef[int, Any]] = deque()

    def enter(self, name: str, kind: str) -> None:
        """Starts a phase; what is allocated in it is of a kind until `mark` knows better."""
        self._free_dead()
        self.settle()
        self._phase = Phase(name)
        self.phases.append(self._phase)
        self._kind = kind
        self._pending = True
        self._phase.peak = self.current

    def add_flop(self, flop: float) -> None:
        """What a custom op does inside."""
        self._phase.flop += flop

    def close(self) -> None:
        """Ends the last phase, and follows no storage any more."""
        self.settle()
        self._found.clear()
        self._dead.clear()

    def mark(self, tensors: Any, kind: str, *, on_host: bool = False) -> None:
        """Says of which kind the storages of tensors (any nesting) are, also at past peaks."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                allocation = self._register(_storage(tensor))
                allocation.kind = kind
                if on_host and not allocation.on_host:
                    self._change(-allocation.nbytes)
                    allocation.on_host = True

    def host_by_kind(self) -> dict[str, int]:
        """Bytes of the living storages that were marked as being on the host."""
        sums = dict.fromkeys(KINDS, 0)
        for _, each in self._found.values():
            sums[each.kind] += each.nbytes if each.on_host else 0
        return sums

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        answer = self._answer(func, args)
        if answer is not None:
            return answer
        own = func.namespace == "hsd_kernels"
        if own:
            args, kwargs = self._on_backend(func, args, kwargs)
        self._depth += 1
        self._in_loss += own
        try:
            result = super().__torch_dispatch__(func, types, tuple(args), kwargs)
        finally:
            self._depth -= 1
            self._in_loss -= own
        negation = func is aten.bitwise_not.default
        if negation or (func is aten._to_copy.default and hasattr(args[0], "_negated")):
            setattr(result, "_negated", True)  # noqa: B010  # its value is false
        # Inside other ops run decompositions, whose arrays the real kernels do not have.
        if self._depth == self._in_loss:
            self._see(func, args, kwargs, result)
        return result

    def _on_backend(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of an op with the backend that is simulated."""
        names = [argument.name for argument in func._schema.arguments]
        if "backend" in names[: len(args)]:
            place = names.index("backend")
            args = (*args[:place], self.backend, *args[place + 1 :])
        elif "backend" in names:
            kwargs = {**kwargs, "backend": self.backend}
        return args, kwargs

    def _answer(self, func: Any, args: Sequence[Any]) -> Any:
        """For what depends on values, which fake tensors have not."""
        if func is aten._local_scalar_dense.default:
            value = not getattr(args[0], "_negated", False)
            dtype = args[0].dtype
            if dtype == torch.bool:
                return value
            return float(value) if dtype.is_floating_point else int(value)
        if func is aten.nonzero.default:
            with self:
                return args[0].new_empty((self.rows, args[0].ndim), dtype=torch.int64)
        if func is aten.repeat_interleave.Tensor:
            with self:
                return args[0].new_empty((self.rows,), dtype=torch.int64)
        if func is aten.index.Tensor and any(_is_mask(index) for index in args[1]):
            mask = next(index for index in args[1] if _is_mask(index))
            shape = (self.rows, *args[0].shape[mask.ndim :])
            with self:
                return args[0].new_empty(shape)
        return None

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._see_collective(func, args)
        elif func.namespace == "fsdp":
            # Buffers of the collectives, and whole gradients on their way into one.
            self._mark_buffers((args, result))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._register(_storage(tensor))
        self._phase.flop += flop_of(func, args, kwargs, result)

    def _mark_buffers(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                allocation = self._register(_storage(tensor))
                if allocation.kind not in LASTING:  # a shard may go into a collective as it is
                    allocation.kind = UNSHARDED

    def _see_collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__.strip("_").replace("_base", "")
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        self._mark_buffers(tensors)
        self._phase.collectives[name] += 1
        self._phase.traffic[name] += max((each.nbytes for each in tensors), default=0)

    def _register(self, storage: torch.UntypedStorage) -> Allocation:
        self._free_dead()
        key = id(storage)
        if key in self._found:
            allocation = self._found[key][1]
            if storage.nbytes() != allocation.nbytes:  # FSDP2 frees and revives by resizing
                self._resized(allocation, storage.nbytes())
            return allocation
        kind = LOSS if self._in_loss else self._kind
        allocation = Allocation(storage.nbytes(), kind)
        self._found[key] = (weakref.KeyedRef(storage, self._dead.append, key), allocation)
        self._change(allocation.nbytes)
        return allocation

    def _resized(self, allocation: Allocation, nbytes: int) -> None:
        if not allocation.on_host:
            self._change(nbytes - allocation.nbytes)
        allocation.nbytes = nbytes

    def _free_dead(self) -> None:
        while self._dead:
            key = self._dead.popleft().key
            allocation = self._found[key][1]
            if not allocation.on_host:
                self._change(-allocation.nbytes)
            del self._found[key]

    def _change(self, nbytes: int) -> None:
        if nbytes < 0:
            self.settle()
        self.current += nbytes
        if self.current > self._phase.peak:
            self._phase.peak = self.current
            self._pending = True

    def settle(self) -> None:
        """Notes what lives at a peak, before the first allocation of it is freed."""
        if self._pending and self.current == self._phase.peak:
            living = [each for _, each in self._found.values() if not each.on_host]
            self._phase.at_peak = [(each, each.nbytes) for each in living]
        self._pending = False

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Follows `storage.resize_`, which no dispatch shows; it is what FSDP2 frees weights by."""
        if id(storage) in self._found:
            self._register(storage).kind = UNSHARDED


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """Of a tensor, or of a DTensor's local part."""
    # Not `to_local`, which is an op of its own.
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


@contextmanager
def watching_resizes(tracker: StepTracker) -> Iterator[None]:
    """`tracker.resize` sees every `UntypedStorage.resize_`."""
    plain = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        result = plain(self, size)
        tracker.resize(self)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
