"""The trace of one step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextlib.contextmanager
def profiled(folder: Path, *, rank: int) -> Iterator[None]:
    """Writes what runs inside as a Chrome trace, with every allocation; on CUDA a memory snapshot.

    Args:
        folder: gets trace-rank<rank>.json, for Perfetto or chrome://tracing, and
            memory-rank<rank>.pickle, for pytorch.org/memory_viz.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history()
    with profile(activities=activities, profile_memory=True, record_shapes=True) as trace:
        yield
    trace.export_chrome_trace(str(folder / f"trace-rank{rank}.json"))
    if cuda:
        snapshot = str(folder / f"memory-rank{rank}.pickle")
        torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)
