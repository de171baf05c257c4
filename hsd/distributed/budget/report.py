"""The budget as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from hsd.distributed.budget.kinds import KINDS
from hsd.distributed.budget.tracker import Phase
from hsd.metrics import save_figure

ENGINE = "engine weights"
CACHE = "engine KV cache"
_COLORS = (
    "#4477aa",
    "#66ccee",
    "#aa3377",
    "#bbbbbb",
    "#228833",
    "#ccbb44",
    "#ee6677",
    "#222255",
    "#997700",
    "#eecc66",
)

Rows = Mapping[str, Mapping[str, int]]
"""phase -> kind -> bytes at the phase's peak."""


def largest_of_each(phases: list[Phase]) -> dict[str, dict[str, int]]:
    """Of the phases of one name, the one with the highest peak."""
    found: dict[str, Phase] = {}
    for phase in phases:
        if phase.name not in found or phase.peak > found[phase.name].peak:
            found[phase.name] = phase
    return {name: phase.by_kind() for name, phase in found.items()}


def gigabytes(nbytes: float) -> str:
    """10^9 bytes, one decimal."""
    return f"{nbytes / 1e9:.1f}"


def memory_table(rows: Rows, *, title: str) -> Table:
    """Kinds down, phases across; GB."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in rows:
        table.add_column(name.removesuffix(" forward"), justify="right", overflow="fold")
    for kind in (*KINDS, ENGINE, CACHE):
        if any(row.get(kind) for row in rows.values()):
            table.add_row(kind, *(gigabytes(row.get(kind, 0)) for row in rows.values()))
    table.add_section()
    totals = (gigabytes(sum(row.values())) for row in rows.values())
    table.add_row("total", *totals, style="bold")
    return table


def draw(rows: Rows, gpu_bytes: int, path: Path, *, title: str) -> None:
    """A bar for each phase, stacked by kind, under the GPU's memory; a PNG."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    names = list(rows)
    bottom = [0.0] * len(names)
    for kind, color in zip((*KINDS, ENGINE, CACHE), _COLORS, strict=True):
        heights = [rows[name].get(kind, 0) / 1e9 for name in names]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, color=color, label=kind, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(gpu_bytes / 1e9, color="black", linestyle="--", linewidth=1)
    axes.set_ylabel("GB per GPU")
    axes.set_title(title)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
