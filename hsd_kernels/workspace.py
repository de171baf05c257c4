"""What a call plans and allocates before its first chunk; simulations of the op allocate it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.plan import Plan, RowGroup, plan_groups
from hsd_kernels.problem import Problem, Side
from hsd_kernels.rows.buffers import row_buffer
from hsd_kernels.rows.compiled import compiler_found


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    student: bool
    weight: bool
    bias: bool


class Heads(NamedTuple):
    """The heads' columns in use, in the operands' dtype.

    A side has the student's, one of its own, or, where its logits are held as their difference to
    the student's, both side by side.
    """

    student: Tensor  # (V, D)
    teacher: Tensor  # (V, D), (V, D_side) or (V, D + D_side)
    reference: Tensor  # likewise


class Workspace(NamedTuple):
    """Memory that all chunks of a call share."""

    heads: Heads
    buffers: Tensor  # (sides * rows_per_chunk, V) the logits of one chunk, all sides stacked
    gradient: Tensor | None  # (rows_per_chunk, V) where it is narrower than the logits
    second: Tensor | None  # (rows_per_chunk, V) gradient of a second reading
    product: Tensor | None  # (V, D) one chunk's share of the head's gradient, where it is rounded


def resolved(problem: Problem, wanted: Wanted) -> Problem:
    """The problem with fp32 logits where differences in bf16 do not do or are not wanted."""
    settings = problem.settings
    sides = [side for side in (problem.teacher, problem.reference) if side is not None]
    combines = (
        # Without a gradient only the CPU knows an error, and log-probs alone are no differences.
        (any(wanted) or (bool(sides) and settings.backend == "cpu"))
        and all(side.shared_head or _can_be_joined(side, problem) for side in sides)
        and problem.bias is None
        and settings.logit_softcap is None
        and settings.logit_scale != 0
        and settings.one_temperature
        and settings.teacher_shares_temperature
        and not settings.top_k
        and not settings.group
    )
    if settings.precision != "difference" or combines:
        return problem
    return with_fp32_logits(problem)


def _can_be_joined(side: Side, problem: Problem) -> bool:
    """Whether x_s W^T - x_t U^T is formed as [x_s, -x_t] [W, U]^T; a GPU has no memory to spare."""
    narrow = side.weight.dtype == side.hidden.dtype == problem.student.dtype
    return problem.settings.backend == "cpu" and side.bias is None and narrow


def with_fp32_logits(problem: Problem) -> Problem:
    """The same problem, its logits held in fp32."""
    return replace(problem, settings=replace(problem.settings, precision="fp32_logits"))


def operand_dtype(problem: Problem) -> torch.dtype:
    """Of heads, hidden states and logit gradients in matrix products.

    Logits and gradients of parameters are formed in the compute dtype whatever it is.
    """
    settings = problem.settings
    if settings.backend == "cpu" and settings.precision != "difference":
        return problem.compute_dtype
    return problem.student.dtype


def logit_dtype(problem: Problem) -> torch.dtype:
    """Of stored logits; "bf16_logits" are stored in more than they are rounded to."""
    if problem.settings.precision == "difference":
        return problem.student.dtype
    return problem.compute_dtype


def new_rows(problem: Problem, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised chunk buffer (rows, columns) as the backend's row kernels need it."""
    if problem.settings.backend == "cpu":
        return problem.student.new_empty((rows, columns), dtype=dtype)
    return row_buffer(rows, columns, dtype=dtype, device=problem.student.device)


def row_group(problem: Problem, rows: int, others: Sequence[Side]) -> RowGroup:
    """Rows that need these sides beside the student."""
    joined = 0
    if problem.settings.precision == "difference":
        joined = sum(not side.shared_head for side in others)
    return RowGroup(rows=rows, sides=1 + len(others), joined=joined)


def plan_of(problem: Problem, groups: Sequence[RowGroup], wanted: Wanted, columns: int) -> Plan:
    """What a call with these groups of rows runs on `columns` columns."""
    sides = [side for side in (problem.teacher, problem.reference) if side is not None]
    settings = problem.settings
    operand = operand_dtype(problem)
    own = sum(not side.shared_head for side in sides)
    copies = 0
    if settings.precision == "difference":
        copies = own
    elif operand != problem.weight.dtype:
        copies = 1 + own
    return plan_groups(
        groups,
        problem.weight.shape[1],
        max(columns, 1),
        temperatures=1 if settings.one_temperature else 2,
        student_gradient=wanted.student,
        weight_gradient=wanted.weight,
        accumulated=problem.weight_grad_out is not None,
        sparse=settings.sparse_tolerance is not None,
        copied_heads=copies,
        element_bytes=problem.compute_dtype.itemsize,
        logit_bytes=logit_dtype(problem).itemsize,
        gradient_bytes=operand.itemsize,
        jsd=settings.backend == "triton" and "jsd" in problem.statistics,
        max_chunk_bytes=settings.max_chunk_bytes,
        compiled=compiler_found(),
        backend=settings.backend,
        precision=settings.precision,
    )


def allocate(
    problem: Problem, wanted: Wanted, plan: Plan, *, sides: int, columns: int
) -> Workspace:
    """The workspace of a plan; `sides` is the most that a group of rows has."""
    operand, stored = operand_dtype(problem), logit_dtype(problem)
    two = any(wanted) and not problem.settings.one_temperature
    rounded = stored == operand != problem.compute_dtype and problem.settings.backend == "cpu"

    def rows_of(count: int, dtype: torch.dtype) -> Tensor:
        return new_rows(problem, count * plan.rows_per_chunk, columns, dtype)

    heads = _heads(problem, columns, operand)
    return Workspace(
        heads=heads,
        buffers=rows_of(sides, stored),
        gradient=rows_of(1, operand) if operand != stored and any(wanted) else None,
        second=rows_of(1, operand) if two else None,
        product=torch.empty_like(heads.student) if rounded and wanted.weight else None,
    )


def _heads(problem: Problem, columns: int, dtype: torch.dtype) -> Heads:
    def operand(side: Side | None) -> Tensor:
        if side is None or side.shared_head:
            return student
        own = side.weight[:columns].to(dtype)
        return torch.cat([student, own], dim=1) if joined else own

    joined = problem.settings.precision == "difference"
    student = problem.weight[:columns].detach().to(dtype)
    return Heads(student, operand(problem.teacher), operand(problem.reference))


def within(problem: Problem, memory: Workspace, *, sides: int) -> tuple[Workspace, int]:
    """A workspace of the problem in the memory of another's logits, and its rows per chunk.

    On a CPU it takes fp32 copies of the heads beside it.
    """
    operand, stored = operand_dtype(problem), logit_dtype(problem)
    columns, pitch = memory.buffers.shape[1], memory.buffers.stride(0)
    apart = operand.itemsize if operand != stored else 0
    row_bytes = pitch * (sides * stored.itemsize + apart)
    storage = memory.buffers.untyped_storage()
    if storage.nbytes() < row_bytes:  # a chunk of one row
        storage = problem.student.new_empty(row_bytes, dtype=torch.uint8).untyped_storage()
    count = storage.nbytes() // row_bytes

    def rows_of(first: int, rows: int, dtype: torch.dtype) -> Tensor:
        empty = torch.empty(0, dtype=dtype, device=problem.student.device)
        offset = first // dtype.itemsize
        return empty.set_(storage, offset, (rows, columns), (pitch, 1))

    end = pitch * sides * count * stored.itemsize
    smaller = Workspace(
        heads=_heads(problem, columns, operand),
        buffers=rows_of(0, sides * count, stored),
        gradient=rows_of(end, count, operand) if apart else None,
        second=None,
        product=None,
    )
    return smaller, count


def simulate(problem: Problem, wanted: Wanted) -> Workspace | None:
    """The workspace of a call of which only shapes are known, as if every row had a weight.

    None where shapes are symbols: a plan of them would tie a compiled graph to their values.
    """
    problem = resolved(problem, wanted)
    count, rows = problem.student.shape[0], problem.weight.shape[0]  # len() would fix a symbol
    if not (isinstance(count, int) and isinstance(rows, int) and count):
        return None
    columns = rows if problem.settings.group else problem.settings.vocab_size
    others = [side for side in (problem.teacher, problem.reference) if side is not None]
    plan = plan_of(problem, [row_group(problem, count, others)], wanted, columns)
    return allocate(problem, wanted, plan, sides=1 + len(others), columns=columns)
