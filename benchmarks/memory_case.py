"""Peak memory of every method on one case, each in a process of its own.

python -m benchmarks.memory_case --work A --dtype fp32 --out FILE [--tokens 4096]
    [--methods NAME ...] [--chunk 512]
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, memory, ours
from benchmarks.case import write
from benchmarks.methods import OURS, Method, methods_for
from benchmarks.work import DTYPES, LOSSES, Case, Work, load


def row(case: Case, work: Work, method: Method, chunk: int) -> dict[str, Any]:
    """Bytes at the peak; or why there are none."""
    if method.chunks == (0,):
        chunk = 0
    elif method.unit == "columns":
        chunk = method.candidates(work)[-1]  # its own default
    found: dict[str, Any] = {"method": method.name, "chunk": chunk, "unit": method.unit}
    try:
        return found | memory.isolated(case, method.name, chunk)._asdict()
    except subprocess.CalledProcessError as error:
        return found | {"failure": f"exit code {error.returncode}"}


def gradient_bytes(work: Work) -> int:
    """Of what autograd is given: the gradients in the dtype of their leaves."""
    size = work.student.element_size()
    head = work.head.numel() if work.trainable else 0
    return (work.student.numel() + head) * size if work.differentiated else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", choices=LOSSES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", help="names; default: all")
    parser.add_argument("--chunk", type=int, default=512, help="rows, of methods that chunk rows")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    case = Case(work=a.work, dtype=a.dtype, tokens=a.tokens)
    work = load(case)
    chosen = [m for m in methods_for(work.loss) if not a.methods or m.name in a.methods]
    write(
        a.out,
        {
            "kind": "memory",
            "case": asdict(case),
            "shape": work.shape,
            "gradient_bytes": gradient_bytes(work),
            "chunk_budget": ours.budget(work, a.chunk),
            "ours": OURS.name,
            "machine": machine.described(),
            "rows": [row(case, work, method, a.chunk) for method in chosen],
        },
    )


if __name__ == "__main__":
    main()
