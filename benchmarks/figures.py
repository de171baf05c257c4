"""Figures of the records: time of the methods in each case, growth, and the sparse trade-off."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FLOORS = ("bare GEMMs", "bare forward GEMMs")
Records = dict[str, dict[str, Any]]


def draw(records: Records, out: Path, prefix: str) -> list[Path]:
    """PNG files; a kind of record that is not there has no figure."""
    drawn = []
    for kind, figure in (("time", _times), ("growth", _growth), ("sparse", _sparse)):
        chosen = {name: record for name, record in records.items() if record["kind"] == kind}
        if chosen:
            path = out / f"{prefix}-{kind}.png"
            figure(chosen).savefig(path, dpi=130)
            plt.close("all")
            drawn.append(path)
    return drawn


def _colour(method: str) -> str:
    if method in FLOORS:
        return "0.6"
    return "C0" if method.startswith("hsd_kernels") else "C1"


def _times(records: Records) -> Any:
    """Median seconds of every method, a panel a case; the floors are grey."""
    figure, axes = plt.subplots(
        len(records), 1, figsize=(8, 0.7 + 2.6 * len(records)), squeeze=False, layout="constrained"
    )
    for axis, (name, record) in zip(axes.flat, records.items(), strict=True):
        rows = [row for row in record["rows"] if not row["failure"]][::-1]
        medians = [statistics.median(row["seconds"]) for row in rows]
        names = [row["method"] for row in rows]
        bars = axis.barh(names, medians, color=[_colour(method) for method in names])
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
        axis.set_title(name.removeprefix("time-"), fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.12)
    return figure


def _growth(records: Records) -> Any:
    """Time over a size, both logarithmic, and peak memory over it; the floor is dashed."""
    figure, axes = plt.subplots(
        len(records), 2, figsize=(9, 3.4 * len(records)), squeeze=False, layout="constrained"
    )
    for pair, record in zip(axes, records.values(), strict=True):
        axis_name = record["axis"]
        for axis, column, unit, scale in (
            (pair[0], "seconds", "seconds", 1),
            (pair[1], "allocated", "peak above inputs, MiB", 2**20),
        ):
            for method in dict.fromkeys(row["method"] for row in record["rows"]):
                own = [row for row in record["rows"] if row["method"] == method]
                axis.plot(
                    [row[axis_name] for row in own],
                    [row[column] / scale for row in own],
                    marker="o",
                    markersize=3,
                    color="0.5" if method in FLOORS else None,
                    linestyle="--" if method in FLOORS else "-",
                    label=method,
                )
            _label(axis, axis_name, unit)
            if column == "seconds":
                sizes = sorted({row[axis_name] for row in record["rows"]})
                axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
                axis.minorticks_off()
            else:  # from zero: what does not grow is to look so
                axis.set(xscale="linear", yscale="linear", ylim=(0, None))
    return figure


def _sparse(records: Records) -> Any:
    """Time against the error of dX, a line a case; points are tolerances."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, record in records.items():
        rows = [row for row in record["rows"] if row["columns_kept"] is not None]
        errors = [row["student_error"] for row in rows]
        medians = [statistics.median(row["seconds"]) for row in rows]
        axis.plot(errors, medians, marker="o", label=name.removeprefix("sparse-"))
        for row, x, y in zip(rows, errors, medians, strict=True):
            axis.annotate(row["method"].rsplit(" ", 1)[-1], (x, y), fontsize=6)
    _label(axis, "relative error of dX", "seconds")
    axis.set_yscale("linear")
    return figure


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
