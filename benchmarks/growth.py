"""Time and memory as tokens and vocabulary grow, the floor beside them.

    python -m benchmarks.growth --axis tokens --out FILE [--sizes 256 512 ...] [--methods NAME ...]

Tokens: work A in fp32. Vocabulary: made states of A's width, 1,024 tokens, fp32. Memory is the peak
of the profiler's allocations.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, synthetic, timing
from benchmarks.case import write
from benchmarks.methods import FLOOR, OURS, Method, execute, methods_for
from benchmarks.work import Case, Work, load

SIZES = {
    "tokens": (256, 512, 1024, 2048, 4096, 8192),
    "vocabulary": (32_768, 65_536, 131_072, 262_144),
}
COMPARED = ("torch", "liger-kernel JSD, compiled")
CHUNK = 512  # rows, of all methods that have chunks
TOKENS, HIDDEN = 1024, 576
LARGEST = 2**28  # N x V of a method that holds all logits: it holds ten such arrays


def point(work: Work, method: Method, rounds: int) -> dict[str, Any]:
    """Seconds of each round and bytes at the peak; the first run, which compiles, is dropped."""

    def run() -> object:
        return execute(method, work, CHUNK)

    torch.compiler.reset()
    run()
    seconds = [timing.seconds(run) for _ in range(rounds)]
    return {
        "method": method.name,
        "tokens": work.shape[0],
        "vocabulary": work.shape[2],
        "seconds": statistics.median(seconds),
        "allocated": memory.allocated(run),
    }


def points(work: Work, rounds: int, names: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Of the floor, this library, and the rivals of COMPARED that are here; or those named."""
    tokens, _, vocabulary = work.shape
    rivals = [m for m in methods_for("forward_kl") if m.name in COMPARED]
    whole = tokens * vocabulary > LARGEST
    methods = [FLOOR, OURS, *(m for m in rivals if m.chunks != (0,) or not whole)]
    chosen = [method for method in methods if not names or method.name in names]
    return [point(work, method, rounds) for method in chosen]


def work_of(axis: str, size: int) -> Work:
    if axis == "tokens":
        return load(Case(work="A", dtype="fp32", tokens=size))
    return synthetic.make(TOKENS, HIDDEN, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axis", choices=SIZES, required=True)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", help="names; default: all")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    before = machine.described()
    found = []
    for size in a.sizes or SIZES[a.axis]:
        found += points(work_of(a.axis, size), a.rounds, a.methods)
    write(a.out, {"kind": "growth", "axis": a.axis, "machine": before, "rows": found})


if __name__ == "__main__":
    main()
