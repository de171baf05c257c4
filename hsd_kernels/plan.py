"""What one call will run: chunks, GEMMs, workspace and traffic, known before it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.checks import check_bytes, check_choice, check_count, check_flag

DEFAULT_CHUNK_BYTES = 512 * 1024**2
# On a GPU a chunk has this many rows, where that takes no more than so many bytes: with fewer, the
# read-modify-write of the head's fp32 gradient, 2 V D 4 bytes a chunk, would dominate.
GPU_CHUNK_ROWS = 2048
GPU_CHUNK_BYTES = 4 * 1024**3
LARGEST_SHARE = 1 / 8  # of the columns that refinement of bf16 logits may compute in fp32
SMALLEST_FUSED_ELEMENTS = 1 << 22  # N x V; below, compiling costs more than it saves

Precision = Literal["fp32_logits", "difference", "bf16_logits"]
Backend = Literal["cpu", "triton", "reference"]
_BACKENDS: tuple[Backend, ...] = ("cpu", "triton", "reference")
_PRECISIONS: tuple[Precision, ...] = ("fp32_logits", "difference", "bf16_logits")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What runs. Bytes are those of this call alone, beyond its inputs.

    Attributes:
        backend: "cpu", "triton" or "reference".
        precision: how logits are held; "fp32_logits" also where differences were asked for and
            do not combine with the call's options.
        fused: whether the elementwise work is compiled.
        rows: tokens that carry weight; the others enter no GEMM.
        rows_per_chunk: rows whose logits exist at one time.
        chunks: passes of the chunk loop.
        gemms: matrix products, in units of 2 * rows * D * V FLOP; those that a sparse backward
            saves are not known beforehand and are counted.
        synchronisations: times the host waits for a device.
        workspace_bytes: chunk buffers, copies of heads, gradients.
        traffic_bytes: modelled reads and writes of the chunk buffers by GEMMs and row kernels.
        refined_columns: of bf16 logits, that were computed again in fp32, summed over the chunks;
            like the next, known only afterwards, and in none of the other numbers.
        repeated_chunks: whose bf16 logits would not do, and which were computed with fp32 logits.
    """

    backend: Backend
    precision: Precision
    fused: bool
    rows: int
    rows_per_chunk: int
    chunks: int
    gemms: float
    synchronisations: int
    workspace_bytes: int
    traffic_bytes: int
    refined_columns: int = 0
    repeated_chunks: int = 0


def record(plan: Plan) -> Tensor:
    """The plan as fp64 numbers on the CPU: a custom op returns tensors, not objects."""
    names = [_BACKENDS.index(plan.backend), _PRECISIONS.index(plan.precision)]
    numbers = [getattr(plan, field.name) for field in fields(Plan)[2:]]
    return torch.tensor([*names, *numbers], dtype=torch.float64)


def from_record(values: Tensor) -> Plan:
    """The inverse of `record`."""
    backend, precision, *numbers = values.tolist()
    own: dict[str, Any] = {
        field.name: number if field.name == "gemms" else int(number)
        for field, number in zip(fields(Plan)[2:], numbers, strict=True)
    }
    own["fused"] = bool(own["fused"])
    return Plan(backend=_BACKENDS[int(backend)], precision=_PRECISIONS[int(precision)], **own)


class RowGroup(NamedTuple):
    """Rows that need the same second sides."""

    rows: int
    sides: int  # logit rows per token: student, and teacher, and reference
    joined: int = 0  # of these, products through two heads at once


def plan_groups(
    groups: Sequence[RowGroup],
    hidden_size: int,
    vocab_size: int,
    *,
    temperatures: int = 1,
    student_gradient: bool = True,
    weight_gradient: bool = True,
    accumulated: bool = False,
    sparse: bool = False,
    copied_heads: int = 0,
    element_bytes: int = 4,
    logit_bytes: int = 4,
    gradient_bytes: int = 4,
    jsd: bool = False,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
    backend: Backend = "cpu",
    precision: Precision = "fp32_logits",
) -> Plan:
    """The plan for rows in groups; see `plan` for the other arguments.

    Args:
        groups: rows that need the same sides.
        accumulated: the caller has memory for the head's gradient.
        sparse: the backward looks at the mass of each column.
        element_bytes: of an element of sums and outputs.
        logit_bytes, gradient_bytes: of one of the stored logits, and of their gradient.
        jsd: the sides are read a second time for their mixture.
        precision: how logits are held.
    """
    gradient = student_gradient or weight_gradient
    difference = precision == "difference"
    sides = max((group.sides for group in groups), default=1)
    # One gradient for each reading; the last takes the place of the logits where it fits.
    formed = temperatures - int(gradient_bytes == logit_bytes) if gradient else 0
    row_bytes = vocab_size * (sides * logit_bytes + formed * gradient_bytes)
    if difference:
        row_bytes += math.ceil(LARGEST_SHARE * vocab_size) * sides * element_bytes
    default = DEFAULT_CHUNK_BYTES
    if backend == "triton":
        default = max(default, min(GPU_CHUNK_ROWS * row_bytes, GPU_CHUNK_BYTES))
    budget = default if max_chunk_bytes is None else max_chunk_bytes
    if budget < row_bytes:
        raise ValueError(
            f"max_chunk_bytes: found {budget}, expected at least {row_bytes}, the logits of a row"
        )
    largest = max((group.rows for group in groups), default=0)
    # Equal chunks: a short last one would run its GEMMs at a worse shape.
    rows_per_chunk = math.ceil(largest / math.ceil(largest * row_bytes / budget)) if largest else 0
    chunks = sum(math.ceil(group.rows / rows_per_chunk) for group in groups if group.rows)
    rows = sum(group.rows for group in groups)
    forward = sum(group.rows * group.sides for group in groups)
    joined = sum(group.rows * group.joined for group in groups)
    backward = rows * (int(student_gradient) + int(weight_gradient))
    logits_moved, gradients_moved = _moved(
        groups,
        gradients=int(student_gradient) + int(weight_gradient),
        two_readings=temperatures == 2,
        mass_readings=(2 if backend == "triton" else 1) if sparse else 0,
        difference=difference,
        jsd=jsd,
    )
    head_elements = vocab_size * hidden_size
    rounded_product = difference and backend == "cpu" and weight_gradient
    return Plan(
        backend=backend,
        precision=precision,
        fused=backend == "cpu" and compiled and rows * vocab_size >= SMALLEST_FUSED_ELEMENTS,
        rows=rows,
        rows_per_chunk=rows_per_chunk,
        chunks=chunks,
        gemms=(forward + joined + backward) / rows if rows else 0.0,
        synchronisations=1 + chunks * (int(sparse and gradient) + int(difference)),
        workspace_bytes=rows_per_chunk * row_bytes
        + copied_heads * head_elements * element_bytes
        + (head_elements * element_bytes if weight_gradient and not accumulated else 0)
        + (head_elements * gradient_bytes if rounded_product else 0)
        + (rows * hidden_size * element_bytes if student_gradient else 0),
        traffic_bytes=vocab_size * (logits_moved * logit_bytes + gradients_moved * gradient_bytes),
    )


def _moved(
    groups: Sequence[RowGroup],
    *,
    gradients: int,
    two_readings: bool,
    mass_readings: int,
    difference: bool,
    jsd: bool,
) -> tuple[int, int]:
    """Rows of logits, and of their gradient, that are read or written.

    Args:
        groups: rows that need the same sides.
        gradients: products that read the logit gradient, 0 to 2.
        two_readings: the student's logits are read at a second temperature where there are sides.
        mass_readings: readings of the gradient for the masses of its columns and rows.
        difference: logits are held as differences.
        jsd: two sides are read again for their mixture.
    """
    rows = sum(group.rows for group in groups)
    forward = sum(group.rows * group.sides for group in groups)
    again = sum(group.rows for group in groups if group.sides > 1) if two_readings else 0
    formed = int(gradients > 0)
    # Written by the GEMM, which reads its centres; read for statistics, for their error (on a CPU
    # for the likeliest columns), and for the gradient.
    logits = forward * (2 + formed + 3 * int(difference)) + again * (1 + formed)
    if jsd:
        logits += sum(group.rows * min(group.sides, 2) for group in groups)
    # The gradient of a second reading is written, both are read, their sum is written, and read for
    # its mass.
    written = formed * (rows * (1 + mass_readings) + 5 * again)
    return logits, rows * gradients + written


def plan(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    teacher: bool = True,
    reference: bool = False,
    temperatures: int = 1,
    student_gradient: bool = True,
    weight_gradient: bool = True,
    copied_heads: int = 0,
    max_chunk_bytes: int | None = None,
    compiled: bool = True,
    backend: Backend = "cpu",
    narrow: bool = False,
    precision: Precision = "fp32_logits",
    jsd: bool = False,
) -> Plan:
    """What `fused_hsd_loss` would run.

    Args:
        rows: N, tokens that carry weight.
        hidden_size: D.
        vocab_size: V, columns in use.
        teacher, reference: whether their logits are needed.
        temperatures: 2 where the KLs have a temperature other than the log-probs', else 1.
        student_gradient, weight_gradient: which gradients are wanted.
        copied_heads: heads that are copied to fp32 because theirs is a narrower dtype; or, where
            differences are held, the other sides' own, joined with the student's.
        max_chunk_bytes: cap of all logits held at one time; default 512 MiB.
        compiled: whether a C++ compiler is there.
        backend: "cpu" or "triton".
        narrow: whether inputs are bf16 or fp16; on the GPU gradients then have a buffer of theirs.
        precision: how logits are held; "difference" needs bf16 inputs.
        jsd: whether the divergence is jsd, for which the GPU reads logits twice.

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected. Among it
            a `max_chunk_bytes` that the logits of one row do not fit in.
    """
    _check(locals())
    joined = copied_heads if precision == "difference" else 0
    return plan_groups(
        [RowGroup(rows, 1 + int(teacher) + int(reference), joined)],
        hidden_size,
        vocab_size,
        temperatures=temperatures,
        student_gradient=student_gradient,
        weight_gradient=weight_gradient,
        copied_heads=copied_heads,
        logit_bytes=2 if precision == "difference" else 4,
        gradient_bytes=2 if precision == "difference" or (narrow and backend == "triton") else 4,
        jsd=jsd and backend == "triton",
        precision=precision,
        max_chunk_bytes=max_chunk_bytes,
        compiled=compiled,
        backend=backend,
    )


def _check(arguments: Mapping[str, Any]) -> None:
    lowest = {"rows": 0, "hidden_size": 1, "vocab_size": 1, "temperatures": 1, "copied_heads": 0}
    for name, least in lowest.items():
        check_count(name, arguments[name], lowest=least)
    if arguments["temperatures"] > 2:
        raise ValueError(f"temperatures: found {arguments['temperatures']}, expected 1 or 2")
    flags = ("teacher", "reference", "narrow", "jsd", "student_gradient", "weight_gradient")
    for name in (*flags, "compiled"):
        check_flag(name, arguments[name])
    check_bytes("max_chunk_bytes", arguments["max_chunk_bytes"])
    check_choice("backend", arguments["backend"], ("cpu", "triton"))
    check_choice("precision", arguments["precision"], _PRECISIONS)
