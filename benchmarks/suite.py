"""Every benchmark, one after the other, each in a process of its own; then tables and targets.

    python -m benchmarks.suite [--quick | --targets] [--minutes M] [--only NAME ...]
        [--again NAME ...] [--list] [--out runs/benchmarks]

A benchmark whose record is there is not run again, so an interrupted run goes on where it stopped.
`--targets` runs what the table of targets needs, the most important first, and shows it in
docs/benchmarks.md. `--quick` runs the ones that decide most, smaller, and starts or finishes
nothing after 11 minutes; `--minutes` is such a limit for any of them.
The machine has to be idle: its load is in every record.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import activations, synthetic, targets
from benchmarks.case import CHOSEN_TOLERANCE
from benchmarks.work import LOSSES

QUICK_MINUTES = 11.0
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
QUICK_RIVALS = ("hsd_kernels", "torch", "torch.compile in chunks", LIGER)
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


def targeted() -> list[Benchmark]:
    """What `benchmarks.targets` reads, then work B and frozen heads: five rounds, short sweeps.

    Work A has all rivals, the others those that came nearest there.
    """
    both, ours = ("--methods", targets.FLOOR, targets.OURS), ("--methods", *QUICK_TIME)
    pairs = ("--methods", *QUICK_PAIRS)
    statistics = ("--methods", targets.FLOOR, targets.STATISTICS, targets.PLAIN)
    two, one, b = ("--sweep", "2"), ("--sweep", "1"), ("--tokens", "512")
    return [
        _case("A", "bf16"),
        _case("A", "fp32", *two),
        _case("A", "bf16", "--sparse", *one, name="sparse-A-bf16"),
        _case("A", "fp32", "--sparse", *one, name="sparse-A-fp32"),
        _case("D", "bf16", *two, *statistics),
        _case("D", "fp32", *two, *statistics),
        _case("C", "bf16", *two, *pairs),
        _case("C", "fp32", *one, *pairs),
        _memory("fp32", "--methods", *QUICK_MEMORY),
        Benchmark(
            name="divergences", command=("benchmarks.divergences", "--methods", *QUICK_RIVALS)
        ),
        *(
            Benchmark(name=f"growth-{axis}", command=("benchmarks.growth", "--axis", axis, *both))
            for axis in ("tokens", "vocabulary")
        ),
        Benchmark(name="update", command=("benchmarks.update",)),
        Benchmark(name="update-memory", command=("benchmarks.update", "--memory")),
        _case("B", "bf16", *b, *two, *ours),
        _case("B", "fp32", *b, *two, *ours),
        _case("B", "bf16", *b, "--sparse", *one, name="sparse-B-bf16"),
        _case("B", "fp32", *b, "--sparse", *one, name="sparse-B-fp32"),
        *(
            _case(work, dtype, "--frozen", *size, *one, *ours, name=f"time-{work}-{dtype}-frozen")
            for work, size in (("A", ()), ("B", b))
            for dtype in ("bf16", "fp32")
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
    found.append(Benchmark(name="update-memory", command=("benchmarks.update", "--memory")))
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
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true")
    kind.add_argument("--targets", action="store_true")
    parser.add_argument("--minutes", type=float, help="start or finish nothing after them")
    parser.add_argument("--only", nargs="+", default=[], help="names to run, and no others")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--again", nargs="+", default=[], help="names to run again")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    a = parser.parse_args()
    kind_of = "quick" if a.quick else "targets" if a.targets else "full"
    benchmarks = {"quick": quick, "targets": targeted, "full": full}[kind_of]()
    if a.list:
        print("\n".join(each.name for each in benchmarks))
        return 0
    for option in ("again", "only"):
        unknown = set(getattr(a, option)) - {each.name for each in benchmarks}
        if unknown:
            parser.error(f"--{option}: found {min(unknown)!r}, expected a name of --list")
    benchmarks = [each for each in benchmarks if not a.only or each.name in a.only]
    folder = a.out / kind_of
    for name in a.again:
        (folder / f"{name}.json").unlink(missing_ok=True)
    minutes = QUICK_MINUTES if a.minutes is None and a.quick else a.minutes
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    make_states(benchmarks, deadline)
    missing = run(benchmarks, folder, deadline=deadline)
    from benchmarks import tables

    tables.publish(folder, summary=tables.SUMMARY if a.targets else None)
    if missing:
        print(f"without a record: {', '.join(missing)}; the same command goes on with them")
    return 1 if missing and not a.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
