"""One job at a time trains in a run's folder, and a job that was killed locks nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsd.metrics import read_json_lines
from hsd.run import loop
from hsd.run.lock import FolderLock

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_under_way_cannot_be_resumed_and_can_be_read(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, run = make_recipe(tmp_path, {"checkpoint_every": 1}), tmp_path / "run"
    original = loop.train_step
    seen: list[str] = []

    def interfered(trainer: Any, stream: Any, step: int, **options: Any) -> Any:
        if step == 2:
            monkeypatch.setattr(loop, "train_step", original)
            while not (run / "resume" / "step-00000002").exists():  # it is written meanwhile
                time.sleep(0.01)
            before = contents(run)
            capsys.readouterr()
            assert run_hsd("train", "--resume", run) == 2
            seen.append(capsys.readouterr().err)
            assert contents(run) == before
            assert run_hsd("report", run, "--out", tmp_path / "report") == 0
        return original(trainer, stream, step, **options)

    monkeypatch.setattr(loop, "train_step", interfered)
    assert run_hsd("train", recipe, "--run-dir", run) == 0
    (error,) = seen
    assert error.startswith(f"hsd: error: run_dir: found {run} in use by process {os.getpid()} on ")
    assert error.count("\n") == 1
    assert len([r for r in read_json_lines(run / "metrics.jsonl") if r["kind"] == "step"]) == 3
    assert not (run / "lock").exists()


HOLDS = """
import sys, time
from pathlib import Path
from hsd.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_locks_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            FolderLock(tmp_path).take()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "lock").exists()
    with FolderLock(tmp_path) as lock:
        lock.take()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
            FolderLock(tmp_path).take()
    assert not (tmp_path / "lock").exists()


def test_a_file_that_its_holder_removed_meanwhile_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    flock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        first.release()  # between the second's opening and its locking
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second.take()
    with pytest.raises(ValueError, match="in use"):
        FolderLock(tmp_path).take()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with FolderLock(tmp_path) as lock, pytest.warns(UserWarning, match="without locks: see that"):
        lock.take()
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_fails_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(file: Any, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        FolderLock(tmp_path).take()
