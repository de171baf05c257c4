"""What is read in the machine code of a compiled kernel: registers, spills, loads, loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Line(NamedTuple):
    """One instruction: its place, where it may jump to, and the bits it loads per thread."""

    place: int
    target: int | None
    load_bits: int
    counts: bool  # it is work: no padding, no end


def bodies(code: list[Line]) -> list[list[Line]]:
    """Innermost loops with a global load; all of the code where there is none."""
    loops = [
        [line for line in code if last.target <= line.place <= last.place]
        for last in code
        if last.target is not None and last.target < last.place
    ]
    loops = [loop for loop in loops if any(line.load_bits for line in loop)]
    inner = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    return inner or [code]


def read_sass(compiled: Any) -> tuple[int, int, list[Line]]:
    """Registers, spilled bytes, instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = _output(tool, "-res-usage", path)
        sass = _output(tool, "-sass", path)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    spilled = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    code, accesses = [], 0
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for place, opcode, operands in re.findall(pattern, sass):
        jump = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        width = (re.findall(r"\.(256|128|64)", opcode) or ["32"])[0]
        code.append(
            Line(
                place=int(place, 16),
                target=int(jump[1], 16) if jump else None,
                load_bits=int(width) if opcode.startswith("LDG") else 0,
                counts=opcode not in ("NOP", "EXIT"),
            )
        )
        accesses += opcode.startswith(("LDL", "STL"))
    return int(registers), spilled or 4 * accesses, code


def read_amdgcn(compiled: Any) -> tuple[int, int, list[Line]]:
    """As `read_sass`; scalar registers are spilled to lanes of vector registers, not to memory."""
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text))

    spilled = value("private_segment_fixed_size") + 4 * value("vgpr_spill_count")
    labels: dict[str, int] = {}
    code = []
    for place, line in enumerate(text.splitlines()):
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = place
        found = re.match(r"\t([a-z]+_\w+)\s*(\.LBB\w+)?", line)
        if not found:
            continue
        load = re.match(r"(?:global|buffer)_load_(\w+)", found[1])
        width = re.fullmatch(r"dword(?:x(\d+))?", load[1]) if load else None
        bits = (32 * int(width[1] or 1) if width else 16) if load else 0
        target = labels.get(found[2]) if found[2] else None  # known: it lies before
        code.append(Line(place=place, target=target, load_bits=bits, counts=True))
    return value("vgpr_count"), spilled, code


def _output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout
