"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl and tables of rollouts."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from hsd.logs.completions import CompletionRow
from hsd.logs.config import LoggingConfig


class Tracker(Protocol):
    """What a run tells; metrics and completions come in the order of their steps."""

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a training step (kind "step") or of an evaluation."""

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Some rollouts of a step."""

    def close(self) -> None:
        """Writes what is not written yet."""


def require_trackers(config: LoggingConfig) -> None:
    """Checks that the packages are installed.

    Raises:
        ValueError: one is not; names the extra.
    """
    for option, wanted, package in (
        ("tensorboard", config.tensorboard, "tensorboard"),
        ("wandb_project", config.wandb_project is not None, "wandb"),
    ):
        if wanted and find_spec(package) is None:
            raise ValueError(
                f"logging.{option}: found {getattr(config, option)!r} without the package "
                f'{package}, expected: pip install "hsd-kernels[{package}]"'
            )


def open_trackers(
    config: LoggingConfig,
    folder: Path,
    *,
    title: str,
    recorded: Mapping[str, Any],
    done: int = 0,
) -> list[Tracker]:
    """The trackers that the configuration asks for.

    Args:
        folder: of the run; a run that goes on there goes on in them.
        recorded: the run's configuration.
        done: steps that the run goes on after.

    Raises:
        ValueError: a package is missing, or Weights & Biases refuses the run.
    """
    require_trackers(config)
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder, recorded, done=done))
    if config.wandb_project is not None:
        trackers.append(WeightsAndBiases(config, folder, title, recorded))
    return trackers


def remove_traces(folder: Path) -> None:
    """Removes what trackers wrote to the folder of a run."""
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)


def scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a record by name, such as train/loss and evaluation/pass_at/4."""
    section = "train" if kind == "step" else kind
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(f"{section}/{key}", value)
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            yield f"{section}/{key}", float(value)


class TensorBoard:
    """Event files in `tensorboard/` of a run."""

    def __init__(self, folder: Path, recorded: Mapping[str, Any], *, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a resumed run repeats are not shown twice.
        purge = done + 1 if done else None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", _verbatim(json.dumps(recorded, indent=2)))

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(kind, values):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        parts = []
        for row in rows:
            record = asdict(row)
            texts = f"{record.pop('prompt')}\n---\n{record.pop('completion')}"
            parts.append(_verbatim(f"{json.dumps(record, ensure_ascii=False)}\n{texts}"))
        self._writer.add_text("completions", "\n\n---\n\n".join(parts), step)

    def close(self) -> None:
        self._writer.close()


def _verbatim(text: str) -> str:
    """Markdown that shows text as it is: an indented block knows no escapes."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class WeightsAndBiases:
    """One run of a project; its id is kept in the run folder."""

    def __init__(
        self, config: LoggingConfig, folder: Path, title: str, recorded: Mapping[str, Any]
    ) -> None:
        import wandb

        id_file = folder / "wandb" / "run-id"
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._table = wandb.Table
        try:
            self._run: Any = wandb.init(
                project=config.wandb_project,
                name=title,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                mode=config.wandb_mode,
                dir=str(folder),
                config=dict(recorded),
            )
        except Exception as error:  # wandb's own and those of its network
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"logging.wandb_project: found {config.wandb_project!r}, which cannot be used "
                f"({type(error).__name__}: {reason}), expected `wandb login` or "
                "logging.wandb_mode offline"
            ) from None
        # A step of our own: a run that goes on from a checkpoint repeats some.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(scalars(kind, values))})

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        columns = [field.name for field in fields(CompletionRow)]
        data = [list(asdict(row).values()) for row in rows]
        self._run.log({"step": step, "completions": self._table(columns=columns, data=data)})

    def close(self) -> None:
        self._run.finish()
