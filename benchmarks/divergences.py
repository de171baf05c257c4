"""Gradient errors in bf16 as the KL shrinks, which is where rounded logits fail.

    python -m benchmarks.divergences --out FILE [--tokens 256] [--hidden 576] [--vocab 49152]
        [--methods NAME ...]

Made states (`benchmarks.synthetic`), rounded to bf16; the teacher then keeps its values in a share
of the coordinates and has the student's in the others, so that the KL falls with the share and no
further rounding moves it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import exact, machine, synthetic
from benchmarks.case import write
from benchmarks.methods import Method, execute, methods_for
from benchmarks.work import Work, cast

SHARES = (1.0, 0.1, 0.01, 0.003)
CHUNK = 128


def nearer(work: Work, share: float) -> Work:
    """The work with a teacher that differs from the student in a share of the coordinates."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(work.student.shape, generator=generator) < share
    return dataclasses.replace(work, teacher=torch.where(chosen, work.teacher, work.student))


def errors(work: Work, methods: Sequence[Method], chunk: int) -> list[dict[str, Any]]:
    """Every method's distance from fp64 on these very operands."""
    truth = exact.exact(work)
    rows = []
    for method in methods:
        torch.compiler.reset()
        found = execute(method, work, min(chunk, method.candidates(work)[-1]))
        rows.append(
            {
                "method": method.name,
                "forward_kl": truth.loss,
                "loss_error": exact.loss_error(found.loss, truth.loss),
                "student_error": exact.relative_error(found.student, truth.student),
                "head_error": exact.relative_error(found.head, truth.head),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in (("tokens", 256), ("hidden", 576), ("vocab", 49_152)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--methods", nargs="+", help="names; default: all")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    before = machine.described()
    work = cast(synthetic.make(a.tokens, a.hidden, a.vocab), torch.bfloat16)
    methods = [m for m in methods_for(work.loss) if m.exact]
    methods = [m for m in methods if not a.methods or m.name in a.methods]
    rows = [row for share in SHARES for row in errors(nearer(work, share), methods, CHUNK)]
    write(a.out, {"kind": "divergences", "shape": work.shape, "machine": before, "rows": rows})


if __name__ == "__main__":
    main()
