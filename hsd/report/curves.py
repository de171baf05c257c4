"""Training curves of several runs: a panel per number, a line per recipe, a band over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsd.report.numbers import series
from hsd.report.runs import RunGroup

# Okabe-Ito: told apart with any colour vision; then again, dashed.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
_DASHES = ("-", "--", ":", "-.")

# (kind of record, key, title)
PANELS = (
    ("evaluations", "avg", "avg@k, evaluation"),
    ("evaluations", "pass", "pass@k, evaluation"),
    ("steps", "reward", "reward of the rollouts"),
    ("steps", "kl", "KL from the teacher, nats per token"),
    ("steps", "ref_kl", "KL from the start, nats per token"),
    ("steps", "entropy", "entropy, nats per token"),
    ("steps", "response_length", "length, tokens"),
    ("steps", "repetition", "repeated 4-grams, share"),
    ("steps", "failed_with_peer_share", "rollouts that fail and have a peer, share"),
)


def write_curves(path: Path, groups: Sequence[RunGroup]) -> None:
    """Writes path.png and path.svg.

    A line is the mean over the seeds that have the step, its band from the lowest to the highest.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "hsd", "font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(11, 8.5), layout="constrained")
        FigureCanvasAgg(figure)
        handles: list[Any] = []
        for axes, (kind, key, title) in zip(figure.subplots(3, 3).flat, PANELS, strict=True):
            handles = [_line(axes, group, kind, key, n) for n, group in enumerate(groups)]
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        labels = [f"{group.label} ({_seeds(len(group.runs))})" for group in groups]
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".png"), dpi=130)
        # No date: equal numbers give equal files.
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _line(axes: Any, group: RunGroup, kind: str, key: str, number: int) -> Any:
    by_step: dict[int, list[float]] = {}
    for run in group.runs:
        for step, value in series(getattr(run, kind), key):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    style: dict[str, Any] = {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    (line,) = axes.plot(steps, means, marker="." if len(steps) < 20 else "", **style)
    if len(group.runs) > 1:
        axes.fill_between(
            steps,
            [min(by_step[step]) for step in steps],
            [max(by_step[step]) for step in steps],
            color=style["color"],
            alpha=0.18,
            lw=0,
        )
    return line
