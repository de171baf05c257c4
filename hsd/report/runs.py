"""Run folders as they were left, and the runs of one recipe under several seeds as one group."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsd.metrics import read_json_lines

Record = Mapping[str, Any]

_NOT_OF_THE_RECIPE = ("seed", "run_dir")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run left.

    Attributes:
        name: of its folder.
        config: the resolved configuration, as nested tables.
        steps: of training, in order; the lines of metrics.jsonl of kind "step".
        evaluations: in order, the first before training; those of kind "evaluation".
    """

    name: str
    path: Path
    config: Record
    steps: Sequence[Record]
    evaluations: Sequence[Record]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def finished(self) -> bool:
        """Whether it was evaluated after its last step."""
        return len(self.evaluations) > 1 and self.evaluations[-1]["step"] == self.config["steps"]


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: Sequence[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]


def read_run(path: Path) -> Run:
    """A run folder, finished or not.

    Raises:
        FileNotFoundError: it lacks config.json or metrics.jsonl.
        ValueError: one of them is not what hsd train writes.
    """
    config_path, metrics_path = path / "config.json", path / "metrics.jsonl"
    for file in (config_path, metrics_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, expected a run folder of hsd train")
    try:
        config = json.loads(config_path.read_bytes())["config"]
        if type(config["seed"]) is not int or type(config["steps"]) is not int:
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{config_path}: found no configuration, expected hsd train's file"
        ) from None
    records = read_json_lines(metrics_path)
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{metrics_path}:{number}: found no record of a step, expected one")
        if record.get("kind") == "evaluation" and not _counts_successes(record):
            raise ValueError(
                f"{metrics_path}:{number}: found an evaluation without samples and "
                "correct_per_question, expected hsd train's record"
            )
    return Run(
        name=path.resolve().name,
        path=path,
        config=config,
        steps=_last_of_each_step(records, "step"),
        evaluations=_last_of_each_step(records, "evaluation"),
    )


def _counts_successes(evaluation: Record) -> bool:
    counts = evaluation.get("correct_per_question")
    return (
        type(evaluation.get("samples")) is int
        and isinstance(counts, list)
        and bool(counts)
        and all(type(count) is int for count in counts)
    )


def _last_of_each_step(records: Sequence[Record], kind: str) -> list[Record]:
    """In the order of steps; of a step that was run twice, after a crash, what was written last."""
    by_step = {record["step"]: record for record in records if record.get("kind") == kind}
    return [by_step[step] for step in sorted(by_step)]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Runs of equal configuration but for seed and folder, in the order they come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {k: v for k, v in run.config.items() if k not in _NOT_OF_THE_RECIPE}
        groups.setdefault(json.dumps(recipe, sort_keys=True), []).append(run)
    labels: dict[str, int] = {}
    made = []
    for members in groups.values():
        label = _label(members[0])
        labels[label] = labels.get(label, 0) + 1
        if labels[label] > 1:
            label = f"{label} ({labels[label]})"
        ordered = sorted(members, key=lambda run: run.seed)
        made.append(RunGroup(label=label, runs=ordered))
    return made


def _label(run: Run) -> str:
    """The folder's name without its seed."""
    return re.sub(rf"-(seed)?{run.seed}(-\d+)?$", "", run.name) or run.name


def differences(groups: Sequence[RunGroup]) -> list[tuple[str, list[str]]]:
    """The keys in which the groups' configurations differ, with each group's value as JSON."""
    flat = [_flat(group.runs[0].config) for group in groups]
    keys = sorted({key for values in flat for key in values})
    table = []
    for key in keys:
        if key in _NOT_OF_THE_RECIPE:
            continue
        values = [each.get(key, "-") for each in flat]
        if len(set(values)) > 1:
            table.append((key, values))
    return table


def _flat(values: Record, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat
