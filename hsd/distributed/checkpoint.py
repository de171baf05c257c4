"""Checkpoints for resuming: whole or absent, written while training goes on.

A checkpoint is a folder `step-00000012` of safetensors files by torch.distributed.checkpoint and of
JSON: nothing in it is unpickled. It is written under another name and renamed once all of it is on
disk, so a process killed at any moment leaves the previous one. All ranks see the same folder.
What no step changes is beside them, once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from hsd.distributed.process import World

# A single process is a single process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

STILL = "initial"
"""The folder beside the checkpoints with the tensors that are the same in all of them."""

_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of a run. Every rank calls every method, in the same order.

    Args:
        folder: exists on every rank.
        keep: checkpoints that stay; older ones are removed once a new one is whole.
    """

    def __init__(self, folder: Path, world: World, *, keep: int) -> None:
        self._folder = folder
        self._world = world
        self._keep = keep
        whole = whole_checkpoints(folder)
        self._saved = whole[-1][0] if whole else None
        self._pending: Future[Any] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # The writing thread's collectives must not meet those of the training step.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        *,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        still: dict[str, Any],
    ) -> None:
        """Copies the tensors, then writes behind the caller's back; one save at a time.

        Args:
            tensors: nested dictionaries of tensors and DTensors; may change after the call.
            shared: JSON values, those of rank 0 are kept.
            own: JSON values of this rank.
            still: like `tensors`, what never changes; written by the first save of a run, which
                waits for it.

        Raises:
            OSError: the previous save failed.
        """
        self.wait()
        fresh, final = self._folder / f".step-{step:08d}", self._folder / f"step-{step:08d}"
        if step == self._saved:  # a step has one state
            return
        # One that a run without a checkpoint left may be of other weights, to rounding.
        if self._saved is None and still:
            self._save_still(still)
        self._saved = step
        self._make(fresh)
        with _whole_or_gone(fresh):
            if self._world.is_main:
                _write_json(fresh / "state.json", shared)
            _write_json(fresh / f"rank-{self._world.rank:05d}.json", own)
        writing = self._write(tensors, fresh)
        self._pending = writing
        if self._world.is_main:  # its part ends when those of all ranks have
            self._pending = self._executor.submit(self._commit, writing, fresh, final)

    def _save_still(self, tensors: dict[str, Any]) -> None:
        fresh, final = self._folder / f".{STILL}", self._folder / STILL
        self._make(fresh)
        with _whole_or_gone(fresh):
            _written(self._write(tensors, fresh))
            if self._world.is_main:
                shutil.rmtree(final, ignore_errors=True)
                _put_in_place(fresh, final)
        self._world.barrier()

    def _make(self, fresh: Path) -> None:
        if self._world.is_main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
        self._world.barrier()

    def _write(self, tensors: dict[str, Any], folder: Path) -> Future[Any]:
        """Ends, on the main rank, when all ranks have written."""
        return cast(
            "Future[Any]",
            async_save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            ),
        )

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            OSError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _written(pending)

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _commit(self, writing: Future[Any], fresh: Path, final: Path) -> None:
        with _whole_or_gone(fresh):
            _written(writing)
            _put_in_place(fresh, final)
        for _, old in whole_checkpoints(self._folder)[: -self._keep]:
            # Renamed first: what is half removed must not look whole.
            dead = old.with_name(f".{old.name}")
            shutil.rmtree(dead, ignore_errors=True)
            old.rename(dead)
            shutil.rmtree(dead)


def whole_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of each, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(name[1]), path) for name, path in found if name)


def load_tensors(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Fills tensors and DTensors in place, whatever number of ranks wrote the checkpoint.

    Raises:
        ValueError: a file of the checkpoint is damaged; or it lacks one of them, or has it in
            another shape.
    """
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # a file that was cut short does not open
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file}: found a damaged file of a checkpoint, expected a whole one ({error})"
            ) from None
    try:
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            no_dist=world.size == 1,
        )
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path}: found no checkpoint of this run's model: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: the file is not one.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: found no readable JSON ({error}), expected an object") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found {type(values).__name__}, expected an object")
    return values


@contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
    """Removes a folder that could not be filled: on a full disk it would keep the room it took."""
    try:
        yield
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _written(writing: Future[Any]) -> None:
    """Waits for the end of a writing.

    Raises:
        OSError: it failed, on whatever rank.
    """
    try:
        writing.result()
    except CheckpointException as error:  # no Exception: it would pass by whoever closes things
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"a checkpoint could not be written: {reason}") from reason


def _put_in_place(fresh: Path, final: Path) -> None:
    """Gives a folder its name once all of it is on disk."""
    for path in (*fresh.iterdir(), fresh):
        _sync(path)
    fresh.rename(final)
    _sync(final.parent)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
