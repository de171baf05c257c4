"""What was aimed at beside what was measured, and by how much it is met or missed.

    python -m benchmarks.targets [FOLDER]      default: runs/benchmarks/full

Exit code 1 where a measured target is missed. A target without its record is "not measured yet".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.case import CHOSEN_TOLERANCE

Records = dict[str, dict[str, Any]]  # name of the benchmark -> what it wrote
OURS, FLOOR, SPARSE_FLOOR = "hsd_kernels", "bare GEMMs", "bare forward GEMMs"
LIGER, PLAIN = "liger-kernel JSD, compiled", "torch"
STATISTICS = "hsd_kernels statistics"
SPARSE = f"hsd_kernels sparse {CHOSEN_TOLERANCE:g}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One line.

    Attributes:
        measured: of the records; KeyError or StopIteration where they lack it.
        at_most: whether the bound is a ceiling; else a floor.
    """

    what: str
    bound: float
    measured: Callable[[Records], float]
    at_most: bool = True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a target; `value` is None where it was not measured."""

    target: Target
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return (
            self.value <= self.target.bound
            if self.target.at_most
            else (self.value >= self.target.bound)
        )

    @property
    def line(self) -> str:
        """A row of Markdown."""
        sign = "<=" if self.target.at_most else ">="
        start = f"| {self.target.what} | {sign} {self.target.bound:.4g} |"
        if self.value is None:
            return f"{start} not measured yet | |"
        distance = abs(self.value / self.target.bound - 1)
        said = "met" if self.met else "**missed**"
        return f"{start} {self.value:.4g} | {said} by {distance:.1%} |"


def read(folder: Path) -> Records:
    """The records of a folder."""
    files = sorted(folder.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def row(record: dict[str, Any], method: str) -> dict[str, Any]:
    """A method's row; StopIteration where it is not there or could not run."""
    rows: list[dict[str, Any]] = record["rows"]
    return next(r for r in rows if r["method"] == method and not r.get("failure"))


def times(name: str, numerator: str, denominator: str) -> Callable[[Records], float]:
    """How many times as long one method takes as another, in a case."""

    def measured(records: Records) -> float:
        record = records[name]
        over, under = row(record, numerator), row(record, denominator)
        return timing.ratio(over["seconds"], under["seconds"])

    return measured


def worst_error(name: str, method: str) -> Callable[[Records], float]:
    def measured(records: Records) -> float:
        found = row(records[name], method)
        return max(found["student_error"], found["head_error"])

    return measured


def best_pair(name: str) -> Callable[[Records], float]:
    """The fastest rival with two fused losses, over the one pass."""

    def measured(records: Records) -> float:
        rivals = [
            r
            for r in records[name]["rows"]
            if r["method"] in (LIGER, "trl chunked JSD") and not r["failure"]
        ]
        best = min(rivals, key=lambda r: statistics.median(r["seconds"]))
        return timing.ratio(best["seconds"], row(records[name], OURS)["seconds"])

    return measured


def sparse_extra(name: str) -> Callable[[Records], float]:
    """dX error beyond the dense path's."""

    def measured(records: Records) -> float:
        dense, sparse = row(records[name], OURS), row(records[name], SPARSE)
        return float(sparse["student_error"] - dense["student_error"])

    return measured


def small_kl_error(records: Records) -> float:
    rows = [r for r in records["divergences"]["rows"] if r["method"] == OURS]
    return max(max(r["student_error"], r["head_error"]) for r in rows)


def peak_over_budget(records: Records) -> float:
    record = records["memory-A-fp32"]
    allowed = record["gradient_bytes"] + record["chunk_budget"]
    return float(row(record, OURS)["allocated"] / allowed)


def peak_over_plain(records: Records) -> float:
    record = records["memory-A-fp32"]
    return float(row(record, OURS)["allocated"] / row(record, PLAIN)["allocated"])


def _line(records: Records, axis: str) -> list[dict[str, Any]]:
    rows = [r for r in records[f"growth-{axis}"]["rows"] if r["method"] == OURS]
    return sorted(rows, key=lambda r: r[axis])


def exponent(axis: str) -> Callable[[Records], float]:
    """Of time in a size, by its two largest: 1 is linear."""

    def measured(records: Records) -> float:
        first, last = _line(records, axis)[-2:]
        return math.log(last["seconds"] / first["seconds"]) / math.log(last[axis] / first[axis])

    return measured


def memory_growth(records: Records) -> float:
    """Bytes per token at the peak beyond those of a token's gradient of 576 fp32 numbers."""
    first, last = _line(records, "tokens")[-2:]
    grown = last["allocated"] - first["allocated"]
    return float(grown / (last["tokens"] - first["tokens"]) / (576 * 4))


def amdahl(records: Records) -> float:
    """How much faster than TRL an update is, as a share of what a head at the floor would give."""
    found = records["update"]["seconds"]
    trl, plain, floor = (statistics.median(found[n]) for n in ("trl", "plain_head", "floor_head"))
    return timing.ratio(found["trl"], found["ours"]) / (trl / (trl - plain + floor))


def update_memory(records: Records) -> float:
    peaks = records["update-memory"]["extra_bytes"]
    return float(peaks["ours"] / peaks["trl"])


def at_most(bound: float, what: str, measured: Callable[[Records], float]) -> Target:
    return Target(what=what, bound=bound, measured=measured)


def at_least(bound: float, what: str, measured: Callable[[Records], float]) -> Target:
    return Target(what=what, bound=bound, measured=measured, at_most=False)


BF16, FP32 = "time-A-bf16", "time-A-fp32"
TARGETS = (
    at_most(1.15, "A bf16: over the bare GEMMs", times(BF16, OURS, FLOOR)),
    at_least(1.15, "A bf16: Liger over ours", times(BF16, LIGER, OURS)),
    at_least(3.0, "A bf16: plain torch over ours", times(BF16, PLAIN, OURS)),
    at_most(0.01, "A bf16: gradient error", worst_error(BF16, OURS)),
    at_most(1.10, "A fp32: over the bare GEMMs", times(FP32, OURS, FLOOR)),
    at_most(1.40, "A bf16 sparse: over the forward GEMMs", times(BF16, SPARSE, SPARSE_FLOOR)),
    at_most(1.25, "A fp32 sparse: over the forward GEMMs", times(FP32, SPARSE, SPARSE_FLOOR)),
    at_least(1.9, "A bf16 sparse: Liger over ours", times(BF16, LIGER, SPARSE)),
    at_least(5.0, "A bf16 sparse: plain torch over ours", times(BF16, PLAIN, SPARSE)),
    at_most(0.01, "A bf16 sparse: dX error beyond dense", sparse_extra(BF16)),
    at_most(0.01, "A fp32 sparse: dX error beyond dense", sparse_extra(FP32)),
    at_least(1.5, "C bf16: best rival's two losses over ours", best_pair("time-C-bf16")),
    at_least(1.5, "C fp32: best rival's two losses over ours", best_pair("time-C-fp32")),
    at_most(1.20, "D bf16: over the bare GEMMs", times("time-D-bf16", STATISTICS, FLOOR)),
    at_most(1.10, "D fp32: over the bare GEMMs", times("time-D-fp32", STATISTICS, FLOOR)),
    at_most(0.01, "bf16, KL to 1e-4: gradient error", small_kl_error),
    at_most(1.10, "A fp32, N=4096: peak over gradients and chunk budget", peak_over_budget),
    at_most(1 / 8, "A fp32, N=4096: peak over plain torch's", peak_over_plain),
    at_most(1.05, "growth of time in N: exponent", exponent("tokens")),
    at_most(1.05, "growth of time in V: exponent", exponent("vocabulary")),
    at_most(1.05, "growth of peak in N: over the gradient of X", memory_growth),
    at_least(0.9, "update: speed-up over TRL, of Amdahl's bound", amdahl),
    at_most(0.6, "update, N=4096: extra memory over TRL's", update_memory),
    at_most(
        1e-3, "update: gradient difference", lambda r: float(r["update"]["gradient_difference"])
    ),
)


def verdicts(records: Records) -> list[Verdict]:
    found = []
    for target in TARGETS:
        try:
            value: float | None = target.measured(records)
        except (KeyError, StopIteration, ValueError):  # no such record, row or rival
            value = None
        found.append(Verdict(target=target, value=value))
    return found


def table(records: Records) -> str:
    """Markdown."""
    head = "| | target | measured | |\n|---|---|---|---|"
    return "\n".join([head, *(verdict.line for verdict in verdicts(records))])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/benchmarks/full"))
    records = read(parser.parse_args().folder)
    print(table(records))
    return 1 if any(verdict.met is False for verdict in verdicts(records)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
