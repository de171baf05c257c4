"""One case: every method that expresses its loss, side by side in one process.

    python -m benchmarks.case --work A --dtype bf16 --out FILE [--frozen] [--tokens 2048]
        [--rounds 5] [--sweep 4] [--methods NAME ...] [--sparse]

Each method's chunk size is swept first, by one timed run each after one that compiles, and the
fastest is kept; its gradients are compared with fp64; then all methods run in alternation.
`--sparse` compares tolerances of the sparse backward in the same way instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import exact, machine, ours, timing
from benchmarks.methods import (
    FLOOR,
    OURS,
    ROWS,
    SPARSE_FLOOR,
    Method,
    Result,
    execute,
    methods_for,
)
from benchmarks.work import DTYPES, LOSSES, Case, Work, load
from hsd_kernels import accumulation

TOLERANCES = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
CHOSEN_TOLERANCE = 0.002  # the largest whose dX error is below 1 % on work A


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method's line.

    Attributes:
        chunk: the fastest of those tried, where several were; 0 for a method without chunks.
        first_seconds: of the very first run, compilation included.
        seconds: of each round, in the alternation of the case.
        loss_error, student_error, head_error: relative, against fp64; None where there is none.
        columns_kept, mass_dropped: shares, of a sparse backward.
        failure: why it could not run here; the rest is then empty.
    """

    method: str
    package: str
    version: str
    unit: str = "rows"
    chunk: int = 0
    chunks_tried: dict[int, float] | None = None
    first_seconds: float | None = None
    seconds: tuple[float, ...] = ()
    loss_error: float | None = None
    student_error: float | None = None
    head_error: float | None = None
    columns_kept: float | None = None
    mass_dropped: float | None = None
    failure: str | None = None


def sparse_method(tolerance: float) -> Method:
    return Method(
        name=f"hsd_kernels sparse {tolerance:g}",
        package="hsd-kernels",
        run=ours.sparse(tolerance),
        losses=("forward_kl",),
        chunks=ROWS,
    )


def methods_of(work: Work, *, sparse: bool) -> list[Method]:
    """What runs in a case."""
    if sparse:
        return [FLOOR, SPARSE_FLOOR, OURS, *(sparse_method(t) for t in TOLERANCES)]
    chosen = methods_for(work.loss)
    if work.loss == "forward_kl":
        chosen += [SPARSE_FLOOR, sparse_method(CHOSEN_TOLERANCE)]
    return chosen


def measure(
    work: Work, methods: Sequence[Method], truth: Result, *, rounds: int, sweep: int
) -> list[Row]:
    """The rows of a case, in the order of `methods`."""
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], object]] = {}
    for method in methods:
        known: dict[str, Any] = {
            "method": method.name,
            "package": method.package,
            "version": str(method.version),
            "unit": method.unit,
        }
        try:
            found = _prepared(work, method, truth, sweep)
        except Exception as error:  # a rival's fault is a row of the table, not the end of it
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rows[method.name] = Row(**known, failure=f"{type(error).__name__}: {reason}"[:200])
            continue
        rows[method.name] = Row(**known, **found)
        runs[method.name] = _runner(method, work, rows[method.name].chunk)
    for name, seconds in timing.alternated(runs, rounds=rounds).items():
        rows[name] = Row(**asdict(rows[name]) | {"seconds": tuple(seconds)})
    return list(rows.values())


def _runner(method: Method, work: Work, chunk: int) -> Callable[[], object]:
    return lambda: execute(method, work, chunk)


def _prepared(work: Work, method: Method, truth: Result, sweep: int) -> dict[str, Any]:
    """The chunk to use, and how near the truth it is."""
    candidates = _spread(method.candidates(work), sweep)
    tried: dict[int, float] = {}
    first = None
    for chunk in candidates:
        torch.compiler.reset()  # each size is compiled as the only one would be
        compiling = timing.seconds(_runner(method, work, chunk))
        first = compiling if first is None else first
        if len(candidates) > 1:
            tried[chunk] = timing.seconds(_runner(method, work, chunk))
    best = min(tried, key=lambda chunk: tried[chunk]) if tried else candidates[0]
    found: dict[str, Any] = {"chunk": best, "chunks_tried": tried, "first_seconds": first}
    if not method.exact:
        return found
    with _kept_columns() as kept:
        result = execute(method, work, best)
    found["loss_error"] = exact.loss_error(result.loss, truth.loss)
    found["student_error"] = exact.relative_error(result.student, truth.student)
    found["head_error"] = exact.relative_error(result.head, truth.head)
    if kept.columns:
        found["columns_kept"] = statistics.mean(kept.columns) / work.shape[2]
        found["mass_dropped"] = kept.dropped / kept.mass
    gc.collect()
    return found


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` values, evenly from the largest down; the middle one where it is one."""
    if count == 1:
        return [values[len(values) // 2]]
    step = max(1, -(-len(values) // count))
    return sorted(values[::-1][::step])


class _Kept:
    """What `kept_columns` decided in the chunks of a call."""

    def __init__(self) -> None:
        self.columns: list[int] = []
        self.mass = self.dropped = 0.0


class _kept_columns:
    """Watches the sparse backward of the calls inside."""

    def __enter__(self) -> _Kept:
        kept, self._decide = _Kept(), accumulation.kept_columns

        def watched(masses: torch.Tensor, **options: Any) -> torch.Tensor | None:
            columns = self._decide(masses, **options)
            # Of each column, (V,), or a gradient (C, V) that has still to be summed over its rows.
            mass = torch.atleast_2d(masses).abs().sum(0, dtype=torch.float64)
            kept.columns.append(len(mass) if columns is None else len(columns))
            kept.mass += float(mass.sum())
            kept.dropped += 0.0 if columns is None else float(mass.sum() - mass[columns].sum())
            return columns

        accumulation.kept_columns = watched
        return kept

    def __exit__(self, *_: object) -> None:
        accumulation.kept_columns = self._decide


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=LOSSES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--frozen", action="store_true", help="no gradient of the head")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", type=int, default=4, help="chunk sizes tried at most")
    parser.add_argument("--methods", nargs="+", help="names; default: all")
    parser.add_argument("--sparse", action="store_true", help="compare tolerances")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    case = Case(work=a.work, dtype=a.dtype, trainable=not a.frozen, tokens=a.tokens)
    work = load(case)
    before = machine.described()
    truth = exact.cached(case, work)
    methods = methods_of(work, sparse=a.sparse)
    methods = [m for m in methods if not a.methods or m.name in a.methods]
    rows = measure(work, methods, truth, rounds=a.rounds, sweep=a.sweep)
    write(
        a.out,
        {
            "kind": "sparse" if a.sparse else "time",
            "case": asdict(case),
            "shape": work.shape,
            "gemms": work.gemms,
            "source": work.source,
            "machine": before,
            "rows": [asdict(row) for row in rows],
        },
    )


def write(path: Path, record: dict[str, Any]) -> None:
    """A record, whole or not at all: one that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    main()
