"""What `hsd train --profile` leaves of one step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from hsd.run import profiling


def test_the_trace_of_a_step_with_its_memory(
    tmp_path: Path, make_recipe: Callable[..., Path], run_hsd: Callable[..., int]
) -> None:
    recipe, run = make_recipe(tmp_path / "recipe", {"steps": 2}), tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run, "--profile") == 0
    (trace,) = (run / "profile").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "[memory]", "Optimizer.step#AdamW.step"} <= names


def test_a_gpu_has_a_snapshot_of_its_allocator_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's recorders replaced: the order in which they are asked, and the files."""
    calls: list[str | None] = []

    def dump(path: str) -> None:
        calls.append("snapshot")
        Path(path).write_bytes(b"")

    class Trace:
        def __init__(self, *, activities: list[Any], **_: Any) -> None:
            assert ProfilerActivity.CUDA in activities

        def __enter__(self) -> Trace:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_bytes(b"")

    memory = torch.cuda.memory
    monkeypatch.setattr(profiling, "profile", Trace)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda enabled="all": calls.append(enabled)
    )
    monkeypatch.setattr(memory, "_dump_snapshot", dump)
    with profiling.profiled(tmp_path / "profile", rank=3):
        calls.append("step")
    assert calls == ["all", "step", "snapshot", None]
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"trace-rank3.json", "memory-rank3.pickle"}
