"""The ways to compute a work's loss and gradients: this library, its rivals, and the floor.

A method runs forward and backward on leaves it is given and returns the loss without a graph. A
library is imported when its method first runs, so that what is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks import floor, rivals
from benchmarks.ours import fused, fused_statistics
from benchmarks.work import Loss, Work

Run = Callable[[Work, Tensor, Tensor, int], Tensor]
"""(work, student (N, D), head (V, D), chunk) -> loss (); leaves' gradients are in their .grad."""

ROWS = (256, 512, 1024, 2048)
DIVERGENCES: tuple[Loss, ...] = ("forward_kl", "with_reference")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way, and what it can do.

    Attributes:
        package: whose version is printed.
        losses: those it expresses.
        chunks: sizes to try; (0,) for a method without chunks.
        unit: of a chunk.
        exact: whether it computes the loss; the floor does not.
    """

    name: str
    package: str
    run: Run
    losses: tuple[Loss, ...]
    chunks: tuple[int, ...] = (0,)
    unit: str = "rows"
    exact: bool = True

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def candidates(self, work: Work) -> tuple[int, ...]:
        """Chunk sizes worth trying: those above the work's size are all the same."""
        size = work.shape[0] if self.unit == "rows" else work.shape[2]
        return tuple(sorted({min(chunk, size) for chunk in self.chunks}))


OURS = Method(
    name="hsd_kernels",
    package="hsd-kernels",
    run=fused,
    losses=("forward_kl", "with_reference", "cross_entropy"),
    chunks=ROWS,
)
FLOOR = Method(
    name="bare GEMMs",
    package="torch",
    run=floor.gemms,
    losses=("forward_kl", "with_reference", "statistics", "cross_entropy"),
    chunks=ROWS,
    exact=False,
)
SPARSE_FLOOR = Method(
    name="bare forward GEMMs",
    package="torch",
    run=floor.forward_gemms,
    losses=("forward_kl",),
    chunks=ROWS,
    exact=False,
)
METHODS: tuple[Method, ...] = (
    FLOOR,
    OURS,
    Method(
        name="hsd_kernels statistics",
        package="hsd-kernels",
        run=fused_statistics,
        losses=("statistics",),
        chunks=ROWS,
    ),
    Method(
        name="torch",
        package="torch",
        run=rivals.plain,
        losses=("forward_kl", "with_reference", "statistics", "cross_entropy"),
    ),
    Method(
        name="torch.compile",
        package="torch",
        run=rivals.compiled,
        losses=("forward_kl", "with_reference", "statistics", "cross_entropy"),
    ),
    Method(
        name="torch.compile in chunks",
        package="torch",
        run=rivals.compiled_chunks,
        losses=("forward_kl", "with_reference", "statistics", "cross_entropy"),
        chunks=(128, 256, 512, 1024),
    ),
    Method(
        name="torch linear_cross_entropy",
        package="torch",
        run=rivals.linear_cross_entropy,
        losses=("forward_kl", "cross_entropy"),
        chunks=(128, 512, 1024),  # of sampled tokens; soft targets have no chunks in torch 2.13
    ),
    Method(
        name="liger-kernel JSD, compiled",
        package="liger-kernel",
        run=rivals.liger,
        losses=DIVERGENCES,
        chunks=ROWS,
    ),
    Method(
        name="trl chunked JSD",
        package="trl",
        run=rivals.trl,
        losses=("forward_kl", "with_reference", "statistics"),
        chunks=(4096, 16_384, 32_768),
        unit="columns",
    ),
    Method(
        name="cut-cross-entropy torch_compile",
        package="cut-cross-entropy",
        run=rivals.cut_cross_entropy,
        losses=("cross_entropy",),
    ),
)


def methods_for(loss: Loss) -> list[Method]:
    """What is installed here and expresses a loss."""
    return [m for m in METHODS if loss in m.losses and m.version is not None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a method computed."""

    loss: float
    student: Tensor | None  # (N, D) gradient
    head: Tensor | None  # (V, D) gradient


def execute(method: Method, work: Work, chunk: int) -> Result:
    """One forward and backward on fresh leaves."""
    student = work.student.detach().requires_grad_(work.differentiated)
    head = work.head.detach().requires_grad_(work.differentiated and work.trainable)
    with torch.set_grad_enabled(work.differentiated):
        loss = method.run(work, student, head, chunk)
    return Result(loss=float(loss), student=student.grad, head=head.grad)
