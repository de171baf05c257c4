"""What a run leaves behind and shows: JSONL files, a live progress bar, tables, curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class JsonLines:
    """A JSONL file; each line is written whole and flushed, so an interrupt loses none."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """One line. NaN and infinities, which JSON lacks, become null."""
        clean = {key: finite(value) for key, value in record.items()}
        self._file.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Its bytes so far, once they are on disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """Null for what JSON lacks: NaN and infinities, in lists too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file.

    Raises:
        ValueError: a line does not parse; names its number.
    """
    return [record for _, record in numbered_json_lines(path)]


def numbered_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, from 1, and what it holds.

    Raises:
        ValueError: a line does not parse; names its number.
    """
    # Not splitlines(): JSON may hold other line separators of Unicode as they are.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            shown = line[:40].decode("utf-8", "replace")
            raise ValueError(f"{path}:{number}: found {shown!r}, expected JSON: {error}") from None


_SHOWN = (
    ("reward", "reward", ".2f"),
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".4f"),
    ("ref_kl", "KL to start", ".4f"),
    ("peer_share", "with peer", ".0%"),
    ("context_length", "context", ".0f"),
    ("tokens_per_second", "tok/s", ".0f"),
)


class _Bar(Progress):
    """A bar with numbers below it: beside it they would take its place in a narrow terminal."""

    numbers = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield self.numbers


class StepProgress:
    """The live bar of a training run: the last step's numbers and the time left."""

    def __init__(self, console: Console, *, steps: int, label: str, done: int = 0) -> None:
        self._progress = _Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(label, total=steps, completed=done)
        self._console = console

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Shows a step that is done; where no bar can live, as a line of its own."""
        numbers = "  ".join(
            f"{label} {metrics[key]:{spec}}" for key, label, spec in _SHOWN if key in metrics
        )
        self._progress.update(self._task, advance=1)
        if self._console.is_terminal:
            self._progress.numbers = Text(numbers)
        else:
            self._console.print(f"step {step}: {numbers}", highlight=False)


def sample_table(samples: Sequence[tuple[str, str, str, bool]], *, title: str) -> Table:
    """Completions: (prompt, answer, response, correct). Model text is shown, never interpreted."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("question", "answer", "completion", ""):
        table.add_column(column, overflow="fold")
    for prompt, answer, response, correct in samples:
        mark = Text("right", "green") if correct else Text("wrong", "red")
        table.add_row(Text(prompt), Text(answer), Text(response), mark)
    return table


def write_curves(path: Path, records: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Four curves over the steps, as PNG: reward and accuracy, KL, KL to the start, coverage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    steps = [record for record in records if record.get("kind") == "step"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    panels = (
        ("reward", "sampled reward"),
        ("kl", "KL to the teacher (nats per token)"),
        ("ref_kl", "KL to the start (nats per token)"),
        ("peer_share", "rollouts with a peer"),
    )
    for axis, (key, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axis.plot([r["step"] for r in steps], [_plotted(r, key) for r in steps], marker=".")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if key == "reward" and evaluations:
            where = [r["step"] for r in evaluations]
            axis.plot(where, [r["avg"] for r in evaluations], "s--", label="avg@k")
            axis.plot(where, [r["pass"] for r in evaluations], "^:", label="pass@k")
            axis.legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """A PNG, written whole or not at all."""
    fresh = path.with_name(f".{path.name}")
    try:
        figure.savefig(fresh, dpi=120, format="png")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _plotted(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return math.nan if value is None else float(value)
