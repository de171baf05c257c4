"""The folder of a run: resolved configuration, metrics, rollouts, curves, checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsd.checks import require_folder
from hsd.config import Config
from hsd.logs.completions import CompletionRow
from hsd.logs.trackers import open_trackers, remove_traces
from hsd.metrics import JsonLines, read_json_lines, write_curves
from hsd.objective.batch import JudgedRollout
from hsd.policy.load import save_policy
from hsd.recipe import to_dict
from hsd.rollout.groups import Group
from hsd.run.lock import FolderLock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATES = "resume"
"""The folder in a run's folder with the checkpoints that an unfinished run resumes from."""

_PACKAGES = ("hsd-kernels", "torch", "transformers", "tokenizers", "numpy", "reasoning-gym")


class RunFolder:
    """Creates and fills the folder of one run, or goes on filling it.

    Args:
        path: must not exist, or be empty; when resuming, the run's.
        config: what the run does.
        lock: of the path; when resuming, taken.
        resume: the bytes of metrics.jsonl and rollouts.jsonl to go on from; what is behind them
            is cut off.
        done: steps before them.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the folder cannot be made; a file to go on with is shorter than that; or what
            the configuration logs to cannot be used.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        *,
        lock: FolderLock,
        resume: tuple[int, int] | None = None,
        done: int = 0,
    ) -> None:
        files = (path / "metrics.jsonl", path / "rollouts.jsonl")
        recorded = {"config": to_dict(config), **environment()}
        if resume is not None:
            for file, length in zip(files, resume, strict=True):
                _cut(file, length)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"run_dir: found {path} in use, expected a new or empty folder")
        else:
            require_folder("run_dir", path)
            (path / STATES).mkdir(parents=True)
            lock.take()
        try:
            trackers = open_trackers(
                config.logging, path, title=path.name, recorded=recorded, done=done
            )
            if resume is None:
                # Last and whole: a folder with it is a run that can be resumed.
                fresh = path / ".config.json"
                fresh.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
                fresh.rename(path / "config.json")
        except (ValueError, OSError):
            if resume is None:
                _remove(path, lock)
            raise
        self.path = path
        self._title = path.name
        self._lock = lock
        self._trackers = trackers
        self._metrics, self._rollouts = map(JsonLines, files)

    def position(self) -> tuple[int, int]:
        """The bytes of metrics.jsonl and rollouts.jsonl, once they are on disk."""
        return self._metrics.position(), self._rollouts.position()

    def finish(self) -> None:
        """Removes the states to resume from: the run has come to its end."""
        dead = self.path / f".{STATES}"
        (self.path / STATES).rename(dead)
        shutil.rmtree(dead)

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers for the trackers."""
        self._metrics.write({"kind": kind, "step": step, **values})
        for tracker in self._trackers:
            tracker.metrics(kind, step, values)

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Some rollouts of a step for the trackers."""
        for tracker in self._trackers:
            tracker.completions(step, rows)

    def rollouts(self, step: int, group: Group, judged: Sequence[JudgedRollout]) -> None:
        """One line of rollouts.jsonl per rollout of a group.

        Args:
            judged: of each rollout; empty for a group that the step sampled and did not keep.
        """
        for record in _records(step, group, judged):
            self._rollouts.write(record)

    def dump(self, step: int, groups: Sequence[tuple[Group, Sequence[JudgedRollout]]]) -> Path:
        """The rollouts of a step that did not come to its end, in a file of their own."""
        path = self.path / f"rollouts-of-step-{step}.jsonl"
        path.unlink(missing_ok=True)
        lines = JsonLines(path)
        for group, judged in groups:
            for record in _records(step, group, judged):
                lines.write(record)
        lines.close()
        return path

    def checkpoint(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        weights: dict[str, torch.Tensor] | None,
    ) -> None:
        """Replaces the checkpoint, a directory for transformers' from_pretrained.

        Args:
            weights: of a sharded model, whole; of an adapted one, merged.
        """
        save_policy(model, tokenizer, self.path / "checkpoint", weights)

    def discard(self) -> None:
        """Removes what the constructor made: a run that cannot start leaves nothing behind."""
        self._close_files()
        _remove(self.path, self._lock)

    def close(self) -> None:
        """Draws the curves and closes the files."""
        self._close_files()
        records = read_json_lines(self.path / "metrics.jsonl")
        write_curves(self.path / "curves.png", records, title=self._title)

    def _close_files(self) -> None:
        self._metrics.close()
        self._rollouts.close()
        for tracker in self._trackers:
            tracker.close()


def _remove(path: Path, lock: FolderLock) -> None:
    """Takes back what a new run has put into its folder."""
    remove_traces(path)
    shutil.rmtree(path / STATES, ignore_errors=True)
    for name in (".config.json", "config.json", "metrics.jsonl", "rollouts.jsonl"):
        (path / name).unlink(missing_ok=True)
    lock.release()
    with contextlib.suppress(OSError):  # not ours, what else is in it
        path.rmdir()


def _records(step: int, group: Group, judged: Sequence[JudgedRollout]) -> Iterator[dict[str, Any]]:
    """Of each rollout all that a replay needs, and what became of it."""
    for index, rollout in enumerate(group.rollouts):
        own = judged[index] if judged else None
        yield {
            "step": step,
            "question": group.question.id,
            "index": index,
            "prompt": group.question.prompt,
            "text": group.texts[index],
            "token_ids": rollout.token_ids,
            "logprobs": rollout.logprobs,
            "loss_mask": rollout.loss_mask,
            "finish_reason": rollout.finish_reason,
            "policy_version": rollout.policy_version,
            "correct": group.rewards[index],
            "outcome": group.outcomes[index].value,
            "kept": own is not None,
            "peer": own.peer if own else None,
            "divergence": own.divergence if own else None,
            "peers": [
                [peer.question_id, peer.step + 1, peer.index]
                for peer in (own.peers.successes if own else ())
            ],
            "advantage": own.advantage if own else None,
            "context_length": own.context_length if own else None,
        }


def _cut(path: Path, length: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise ValueError(f"{path}: found {size} bytes, expected the {length} of the checkpoint")
    if size > length:
        os.truncate(path, length)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": os.cpu_count(),
    }
