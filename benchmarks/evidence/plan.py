"""The plan file: what is run, in which order, and which claims are judged."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Job:
    """One recipe under some seeds, or the credit of one model's rollouts.

    Attributes:
        kind: "train"; or "credit": warm the recipe's model up, sample, measure.
        name: of the job, and the beginning of its folders' names.
        recipe: path of a recipe.
        seeds: one run each.
        flags: further arguments of `hsd train`.
        groups, contexts: of `hsd credit`.
    """

    kind: Literal["train", "credit"]
    name: str
    recipe: Path
    seeds: tuple[int, ...] = (0,)
    flags: tuple[str, ...] = ()
    groups: int = 64
    contexts: tuple[str, ...] = ("answer_peer", "answer")

    def folder_name(self, seed: int) -> str:
        return f"{self.name}-seed{seed}"

    def commands(self, folder: Path, seed: int) -> list[tuple[list[str], Path]]:
        """Arguments of `hsd`, each with the folder that it leaves."""
        out = folder / self.folder_name(seed)
        train = ["train", str(self.recipe), "--seed", str(seed)]
        if self.kind == "train":
            return [([*train, "--run-dir", str(out), *self.flags], out)]
        warm = folder / f"{self.name}-seed{seed}-model"
        short = ["--steps", "0", "--evaluation.samples", "1", *self.flags]
        credit = ["credit", str(self.recipe), "--model", str(warm / "checkpoint")]
        credit += ["--groups", str(self.groups), "--contexts", *self.contexts, "--out", str(out)]
        return [([*train, "--run-dir", str(warm), *short], warm), (credit, out)]

    def complete(self, records: Path, seed: int) -> bool:
        """Whether there is nothing left to run."""
        return (records / self.folder_name(seed)).is_dir()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The claim that one recipe ends better than another, or than it began ("base").

    Attributes:
        claim: in words.
        better, worse: names of jobs; worse may be "base", the model before training.
        measure: "avg", avg@k; "pass", pass@k with k samples.
        equal: what both had the same of: "rollouts", or "time" of the training steps.
    """

    claim: str
    better: str
    worse: str
    measure: Literal["avg", "pass"] = "avg"
    equal: Literal["rollouts", "time"] = "rollouts"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Attributes:
    folder: of all runs.
    records: folder of what the page needs of each complete run; it is meant to be committed, so
        that a plan of many hours goes on in another clone.
    page: the Markdown file.
    title, about: its heading, and the paragraph below it.
    seeds: finished runs of a job that a verdict needs.
    """

    folder: Path
    records: Path
    page: Path
    title: str
    about: str
    seeds: int = 3
    jobs: tuple[Job, ...]
    claims: tuple[Comparison, ...] = field(default=())

    def order(self) -> list[tuple[Job, int]]:
        """All seeds of the first job, then of the second: a claim needs all seeds of its two."""
        return [(job, seed) for job in self.jobs for seed in job.seeds]

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)


def load_plan(path: Path) -> Plan:
    """Raises ValueError, one line, where the file is no plan."""
    try:
        values: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        plan = pydantic.TypeAdapter(Plan).validate_python(values, extra="forbid")
    except (tomllib.TOMLDecodeError, pydantic.ValidationError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    names = [job.name for job in plan.jobs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{path}: jobs: found {names}, expected different names")
    for job in plan.jobs:
        if job.kind == "credit" and job.seeds != (0,):
            raise ValueError(f"{path}: {job.name}: seeds: found {job.seeds}, expected 0 for credit")
    trained = {job.name for job in plan.jobs if job.kind == "train"}
    for claim in plan.claims:
        for name in (claim.better, claim.worse):
            if name not in trained and not (name == "base" and name == claim.worse):
                raise ValueError(f"{path}: claims: found {name!r}, expected a job that trains")
    return plan
