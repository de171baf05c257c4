"""Peak memory of one run above its inputs, in a process of its own, read in two ways.

    python -m benchmarks.memory --work A --dtype fp32 --tokens 4096 --method torch --chunk 0

prints a JSON object: `allocated`, from the profiler's memory events, which name every tensor; and
`resident`, the growth of the process's resident size, which also sees what libraries hold. Bytes.
The first run, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

from benchmarks.work import DTYPES, LOSSES, Case, load


class Peak(NamedTuple):
    """Bytes above what was there before; None where the system does not tell."""

    allocated: int
    resident: int | None


def measured(run: Callable[[], object]) -> Peak:
    """The peaks of a run that has run before; what it returns is freed before the next one."""
    run()
    resident = resident_growth(run)
    return Peak(allocated=allocated(run), resident=resident)


def allocated(run: Callable[[], object]) -> int:
    """The highest sum of live allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    memory = [event for event in results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in memory), default=0)


def resident_growth(run: Callable[[], object]) -> int | None:
    """How far the resident size rises above where it stood; None off Linux."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status: found no {name}")


def isolated(case: Case, method: str, chunk: int, *, timeout: float | None = None) -> Peak:
    """`measured` in a fresh process.

    Raises:
        subprocess.CalledProcessError: it failed, for want of memory perhaps.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--work", case.work]
    command += ["--dtype", case.dtype, "--tokens", str(case.tokens)]
    command += [] if case.trainable else ["--frozen"]
    command += ["--method", method, "--chunk", str(chunk)]
    # A fixed threshold: freed tensors go back to the system and are seen to.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    ran = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    )
    return Peak(**json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=LOSSES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--frozen", action="store_true", help="no gradient of the head")
    parser.add_argument("--method", required=True)
    parser.add_argument("--chunk", type=int, required=True)
    a = parser.parse_args()
    from benchmarks.methods import METHODS, execute

    method = next(m for m in METHODS if m.name == a.method)
    case = Case(work=a.work, dtype=a.dtype, trainable=not a.frozen, tokens=a.tokens)
    work = load(case)
    print(json.dumps(measured(lambda: execute(method, work, a.chunk))._asdict()))


if __name__ == "__main__":
    main()
