"""The folder of a run: resolved configuration, metrics, rollouts, curves, checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hsd.config import Config
from hsd.logs.completions import CompletionRow
from hsd.logs.trackers import open_trackers, remove_traces
from hsd.metrics import JsonLines, read_json_lines, write_curves
from hsd.objective.batch import JudgedRollout
from hsd.policy.load import save_policy
from hsd.recipe import to_dict
from hsd.rollout.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGES = ("hsd-kernels", "torch", "transformers", "tokenizers", "numpy", "reasoning-gym")


class RunFolder:
    """Creates and fills the folder of one run.

    Args:
        path: must not exist, or be empty.
        config: what the run does.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: what the configuration logs to cannot be used.
    """

    def __init__(self, path: Path, config: Config) -> None:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"run_dir: found {path} in use, expected a new or empty folder")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._title = path.name
        recorded = {"config": to_dict(config), **environment()}
        try:
            self._trackers = open_trackers(config.logging, path, title=path.name, recorded=recorded)
        except ValueError:
            remove_traces(path)
            path.rmdir()
            raise
        (path / "config.json").write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
        self._metrics = JsonLines(path / "metrics.jsonl")
        self._rollouts = JsonLines(path / "rollouts.jsonl")

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
        """One line of rollouts.jsonl per rollout."""
        for index, (rollout, outcome) in enumerate(zip(group.rollouts, judged, strict=True)):
            self._rollouts.write(
                {
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
                    "peer": outcome.peer,
                    "divergence": outcome.divergence,
                    "peers": [
                        [peer.question_id, peer.step + 1, peer.index]
                        for peer in outcome.peers.successes
                    ],
                    "advantage": outcome.advantage,
                    "context_length": outcome.context_length,
                }
            )

    def checkpoint(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        weights: dict[str, torch.Tensor] | None,
    ) -> None:
        """Replaces the checkpoint, a directory for transformers' from_pretrained.

        Args:
            weights: of a sharded model, whole.
        """
        save_policy(model, tokenizer, self.path / "checkpoint", weights)

    def discard(self) -> None:
        """Removes what the constructor made: a run that cannot start leaves nothing behind."""
        self._close_files()
        remove_traces(self.path)
        for name in ("config.json", "metrics.jsonl", "rollouts.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not ours, what else is in it
            self.path.rmdir()

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
