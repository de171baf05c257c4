"""Compiles the Triton row kernels for GPUs that are not here, and prints what came out.

    python -m benchmarks.compiled [--targets sm_90 gfx942] [--all] [--json FILE]

The kernels are compiled as their launcher would: it is called on small CPU tensors of an odd
vocabulary, and what it would start is compiled, and measured in the machine code, instead.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: compile, do not interpret

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.machine_code import bodies, read_amdgcn, read_sass
from benchmarks.row_variants import STORAGE, variants
from hsd_kernels.rows import RowInputs, RowSpec, triton_rows
from hsd_kernels.rows.buffers import row_buffer
from hsd_kernels.rows.partials import Partial
from hsd_kernels.statistics import Coefficients, Row

ROWS, COLUMNS = 4, 1001
TILES = 75  # of a vocabulary of 151,936, for the kernel that merges them
TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}
WARPS_PER_SM = {80: 64, 90: 64, 100: 64, 120: 48}
SHARED_PER_SM = {80: 164, 90: 228, 100: 228, 120: 100}  # KiB


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel in machine code.

    Attributes:
        registers: per thread; AMD: vector registers.
        spilled_bytes: of memory per thread that registers are spilled to.
        shared_bytes: per program.
        row_load_bits: widths of loads of 128 bits and more, and how many there are per thread.
        narrow_loads: loads below 128 bits: values of the whole row, as many for any tile.
        body_load_bits: what each body loads in 128 bits and more. A body is an innermost loop that
            loads anything; the whole kernel where there is none, as it then sees its tile once.
        expected_load_bits: what a thread must load of its row data in a body; 0 for the kernel
            that reads statistics of tiles, a hundredth of the logits.
        instructions: per thread and element, as they stand in the code, which has no loop.
        occupancy: share of the warps that fit a multiprocessor.
    """

    target: str
    kernel: str
    variant: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    row_load_bits: dict[str, int]
    narrow_loads: int
    body_load_bits: list[int]
    expected_load_bits: int
    instructions: float
    occupancy: float

    @property
    def faults(self) -> list[str]:
        """What must not be: spills, and row data that is loaded in less than 128 bits."""
        found = []
        if self.spilled_bytes:
            found.append(f"{self.spilled_bytes} bytes spilled")
        for loaded in self.body_load_bits if self.expected_load_bits else ():
            # An unrolled loop has its loads more than once.
            if loaded == 0 or loaded % self.expected_load_bits:
                expected = self.expected_load_bits
                found.append(f"{loaded} of {expected} bits loaded in 128 bits or more")
        return found


class AbsentDevice:
    """A device of `target` as far as compilation asks for one."""

    def __init__(self, target: GPUTarget, index: int) -> None:
        self._target, self._index = target, index

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._index  # compiled kernels are kept by it

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_variant(spec: RowSpec, storage: str) -> list[tuple[str, Any, int]]:
    """(kernel, what triton.compile gave, bytes of row data per element) of each launch."""
    dtype, gradient_dtype = STORAGE[storage]
    started: list[tuple[str, Any, int]] = []

    def record(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
        name, compiled = kernel.__name__, kernel.warmup(*arguments, grid=grid, **options)
        started.append((name, compiled, _row_bytes(name, arguments[0])))

    def buffer(kind: torch.dtype) -> torch.Tensor:
        return row_buffer(ROWS, COLUMNS, dtype=kind, device=torch.device("cpu"))

    one, number = torch.ones(ROWS), torch.tensor(0.5)
    x = RowInputs(
        student=buffer(dtype),
        teacher=None if spec.teacher == "absent" else buffer(dtype),
        reference=None if spec.reference == "absent" else buffer(dtype),
        targets=torch.zeros(ROWS, dtype=torch.int64) if spec.target else None,
        inverse_temperature=one,
        teacher_inverse_temperature=one,
        logit_scale=number,
        softcap=number,
        jsd_beta=number,
        jsd_complement=number,
    )
    statistics, out = torch.zeros(len(Row), ROWS), buffer(gradient_dtype)
    launch, triton_rows.launch = triton_rows.launch, record
    try:
        triton_rows.row_partials(spec, x)
        triton_rows.merge_tiles(spec, torch.zeros(TILES, len(Partial), ROWS))
        if spec.jsd:
            triton_rows.row_mixture(spec, x, statistics)
        triton_rows.row_grad(spec, x, statistics, Coefficients(*[one] * 7), out)
        triton_rows.masses(out)
        if storage == "bf16" and not spec.softcap:
            triton_rows.row_errors(spec, x, statistics, Coefficients(*[one] * 7))
    finally:
        triton_rows.launch = launch
    return started


def _row_bytes(kernel: str, read: RowInputs | torch.Tensor) -> int:
    """Bytes of row data per element of what a kernel gets to read, its first argument."""
    if isinstance(read, RowInputs):
        sides = (read.student, read.teacher, read.reference)
        return sum(side.element_size() for side in sides if side is not None)
    return 0 if kernel == "merge_kernel" else read.element_size()


def measure(target: str, kernel: str, variant: str, compiled: Any, row_bytes: int) -> Compiled:
    gpu = TARGETS[target]
    threads = compiled.metadata.num_warps * gpu.warp_size
    # The mass of columns is summed over steps of 8 rows of 512 columns.
    whole = {"column_mass_kernel": 8 * 512, "column_error_kernel": 8 * threads}
    whole["merge_kernel"] = triton_rows.MERGED
    elements = whole.get(kernel, triton_rows.TILE) // threads
    read = read_sass if gpu.backend == "cuda" else read_amdgcn
    registers, spilled, code = read(compiled)
    loads = Counter(line.load_bits for line in code if line.load_bits)
    shared = compiled.metadata.shared
    return Compiled(
        target=target,
        kernel=kernel.removesuffix("_kernel"),
        variant=variant,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        row_load_bits={str(w): n for w, n in sorted(loads.items()) if w >= 128},
        narrow_loads=sum(n for w, n in loads.items() if w < 128),
        body_load_bits=[
            sum(line.load_bits for line in body if line.load_bits >= 128) for body in bodies(code)
        ],
        expected_load_bits=8 * row_bytes * elements,
        instructions=round(sum(line.counts for line in code) / elements, 1),
        occupancy=_occupancy(gpu, registers, shared, compiled.metadata.num_warps),
    )


def _occupancy(gpu: GPUTarget, registers: int, shared: int, warps: int) -> float:
    if gpu.backend == "hip":  # 512 vector registers a lane of each of 4 SIMDs, 8 waves at most
        return round(min(8, 512 // (-(-registers // 8) * 8)) / 8, 2)
    most = WARPS_PER_SM[gpu.arch]
    by_registers = 65_536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_PER_SM[gpu.arch] * 1024 // (shared + 1024)
    return round(min(by_registers, by_shared, most // warps) * warps / most, 2)


def compile_all(targets: list[str], *, everything: bool) -> list[Compiled]:
    found, seen = [], set()
    for index, target in enumerate(targets):
        driver.set_active(AbsentDevice(TARGETS[target], index))
        for name, spec, storage in variants(everything=everything):
            for kernel, compiled, row_bytes in compile_variant(spec, storage):
                if (target, compiled.hash) not in seen:
                    seen.add((target, compiled.hash))
                    variant = f"{name}; {storage}"
                    found.append(measure(target, kernel, variant, compiled, row_bytes))
    return found


def table(found: list[Compiled]) -> Table:
    heads = (
        "target", "kernel", "variant", "registers", "spilled B", "shared B", "row loads, bits",
        "other loads", "instructions / element", "occupancy", "faults",
    )  # fmt: skip
    result = Table(*heads, title=f"triton {triton.__version__}, tiles of {triton_rows.TILE}")
    for each in found:
        loads = ", ".join(f"{count} x {width}" for width, count in each.row_load_bits.items())
        result.add_row(
            each.target,
            each.kernel,
            each.variant,
            *(str(n) for n in (each.registers, each.spilled_bytes, each.shared_bytes)),
            loads,
            str(each.narrow_loads),
            f"{each.instructions:.1f}",
            f"{each.occupancy:.0%}",
            "; ".join(each.faults),
        )
    return result


def summary(found: list[Compiled]) -> Table:
    """The extremes of each kernel's variants, by target."""
    heads = (
        "target", "kernel", "variants", "registers", "spilled B", "shared B", "row loads, bits",
        "instructions / element", "occupancy", "faults",
    )  # fmt: skip
    result = Table(*heads, title=f"triton {triton.__version__}, least to most", box=box.MARKDOWN)
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for each in found:
        groups.setdefault((each.target, each.kernel), []).append(each)
    for (target, kernel), group in groups.items():
        widths = sorted({int(width) for each in group for width in each.row_load_bits})
        result.add_row(
            target,
            kernel,
            str(len(group)),
            _range(each.registers for each in group),
            _range(each.spilled_bytes for each in group),
            _range(each.shared_bytes for each in group),
            ", ".join(str(width) for width in widths),
            _range(round(each.instructions) for each in group),
            _range((round(100 * each.occupancy) for each in group), "%"),
            str(sum(bool(each.faults) for each in group)),
        )
    return result


def _range(values: Iterable[int], unit: str = "") -> str:
    ordered = sorted(set(values))
    ends = [ordered[0], *ordered[1:][-1:]]
    return " - ".join(f"{end:,}{unit}" for end in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="every variant, not a selection")
    parser.add_argument("--json", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    found = compile_all(arguments.targets, everything=arguments.all)
    for shown in (table(found), summary(found)):
        Console(width=200).print(shown)
    if arguments.json:
        records = [asdict(each) | {"faults": each.faults} for each in found]
        content = {"triton": triton.__version__, "kernels": records}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if any(each.faults for each in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
