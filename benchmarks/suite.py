"""Every benchmark, one after the other, each in a process of its own; then tables and targets.

    python -m benchmarks.suite [--quick] [--out runs/benchmarks] [--again NAME ...] [--list]

A benchmark whose record is there is not run again, so an interrupted run goes on where it stopped.
`--quick` runs the ones that decide most, smaller, and starts or finishes nothing after 11 minutes.
The machine has to be idle: its load is in every record.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import activations, synthetic
from benchmarks.case import CHOSEN_TOLERANCE
from benchmarks.work import LOSSES

QUICK_SECONDS = 11 * 60
LIGER = "liger-kernel JSD, compiled"
QUICK_MEMORY = ("hsd_kernels", "torch", LIGER)
QUICK_TIME = (
    "bare GEMMs",
    "bare forward GEMMs",
    "hsd_kernels",
    f"hsd_kernels sparse {CHOSEN_TOLERANCE:g}",
    "torch",
    "torch.compile in chunks",
    LIGER,
)
QUICK_PAIRS = ("bare GEMMs", "hsd_kernels", LIGER, "trl chunked JSD")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One record: its name and the module with arguments that writes it."""

    name: str
    command: tuple[str, ...]


def _case(work: str, dtype: str, *options: str, name: str = "") -> Benchmark:
    return Benchmark(
        name=name or f"time-{work}-{dtype}",
        command=("benchmarks.case", "--work", work, "--dtype", dtype, *options),
    )


def _memory(dtype: str, *options: str) -> Benchmark:
    return Benchmark(
        name=f"memory-A-{dtype}",
        command=("benchmarks.memory_case", "--work", "A", "--dtype", dtype, *options),
    )


def quick() -> list[Benchmark]:
    """The most telling first."""
    few = ("--rounds", "3", "--sweep", "1")
    return [
        _case("A", "bf16", *few, "--methods", *QUICK_TIME),
        _case("A", "fp32", *few, "--methods", *QUICK_TIME),
        _case("D", "fp32", *few),
        _case("D", "bf16", *few),
        _memory("fp32", "--methods", *QUICK_MEMORY),
        _case("C", "bf16", *few, "--methods", *QUICK_PAIRS),
        Benchmark(
            name="update", command=("benchmarks.update", "--tokens", "1024", "--rounds", "2")
        ),
    ]


def full() -> list[Benchmark]:
    """All works, dtypes and heads."""
    found = []
    for work in LOSSES:
        size = ("--tokens", "512") if work == "B" else ()
        for dtype in ("bf16", "fp32"):
            found.append(_case(work, dtype, *size))
            if work in "ABC":
                frozen = f"time-{work}-{dtype}-frozen"
                found.append(_case(work, dtype, "--frozen", *size, name=frozen))
            if work in "AB":
                found.append(_case(work, dtype, "--sparse", *size, name=f"sparse-{work}-{dtype}"))
    found += [_memory("fp32"), _memory("bf16")]
    for axis in ("tokens", "vocabulary"):
        found.append(
            Benchmark(name=f"growth-{axis}", command=("benchmarks.growth", "--axis", axis))
        )
    found.append(Benchmark(name="divergences", command=("benchmarks.divergences",)))
    found.append(Benchmark(name="update", command=("benchmarks.update",)))
    return found


def run(benchmarks: list[Benchmark], folder: Path, *, deadline: float | None) -> list[str]:
    """Runs what has no record yet; returns the names of what still has none."""
    missing = []
    for position, each in enumerate(benchmarks, start=1):
        out = folder / f"{each.name}.json"
        where = f"[{position}/{len(benchmarks)}] {each.name}"
        if out.exists():
            print(f"{where}: recorded", flush=True)
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            missing.append(each.name)
            continue
        started = time.monotonic()
        ended = _ended(["-m", *each.command, "--out", str(out)], left)
        print(f"{where}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
        if ended != "done":
            missing.append(each.name)
    return missing


def _ended(arguments: list[str], timeout: float | None) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    try:
        code = subprocess.run(command, timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        return "out of time"
    return "done" if code == 0 else f"failed with exit code {code}"


def make_states(benchmarks: list[Benchmark], deadline: float | None) -> None:
    """Makes the states that the benchmarks read and that are not cached, once."""
    made_for_b = any("B" in each.command for each in benchmarks)
    for module in (activations, synthetic) if made_for_b else (activations,):
        if not module.path().exists():
            left = None if deadline is None else deadline - time.monotonic()
            ended = _ended(["-m", module.__name__], left)
            print(f"{module.__name__}: {ended}", flush=True)
            if ended != "done":
                raise SystemExit(f"{module.__name__} {ended}: there is nothing to measure")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--again", nargs="+", default=[], help="names to run again")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    a = parser.parse_args()
    benchmarks = quick() if a.quick else full()
    if a.list:
        print("\n".join(each.name for each in benchmarks))
        return 0
    unknown = set(a.again) - {each.name for each in benchmarks}
    if unknown:
        parser.error(f"--again: found {min(unknown)!r}, expected a name of --list")
    folder = a.out / ("quick" if a.quick else "full")
    for name in a.again:
        (folder / f"{name}.json").unlink(missing_ok=True)
    deadline = time.monotonic() + QUICK_SECONDS if a.quick else None
    make_states(benchmarks, deadline)
    missing = run(benchmarks, folder, deadline=deadline)
    from benchmarks import tables

    tables.publish(folder)
    if missing:
        print(f"without a record: {', '.join(missing)}; the same command goes on with them")
    return 1 if missing and not a.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
