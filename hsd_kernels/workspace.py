"""What a call plans and allocates before its first chunk; simulations of the op allocate it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.plan import Plan, RowGroup, plan_groups
from hsd_kernels.problem import Problem, Side
from hsd_kernels.rows.buffers import row_buffer
from hsd_kernels.rows.torch_rows import compiler_found


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    student: bool
    weight: bool
    bias: bool


class Heads(NamedTuple):
    """The heads' columns in use, in the operands' dtype."""

    student: Tensor  # (V, D)
    teacher: Tensor
    reference: Tensor


class Workspace(NamedTuple):
    """Memory that all chunks of a call share."""

    heads: Heads
    buffers: Tensor  # (sides * rows_per_chunk, V) the logits of one chunk, all sides stacked
    gradient: Tensor | None  # (rows_per_chunk, V) where it is narrower than the logits
    second: Tensor | None  # (rows_per_chunk, V) gradient of a second reading


def operand_dtype(problem: Problem) -> torch.dtype:
    """Of heads, hidden states and logit gradients in matrix products.

    Logits and gradients of parameters are formed in the compute dtype whatever it is.
    """
    if problem.settings.backend == "cpu":
        return problem.compute_dtype
    return problem.student.dtype


def new_rows(problem: Problem, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised chunk buffer (rows, columns) as the backend's row kernels need it."""
    if problem.settings.backend == "cpu":
        return problem.student.new_empty((rows, columns), dtype=dtype)
    return row_buffer(rows, columns, dtype=dtype, device=problem.student.device)


def plan_of(problem: Problem, groups: Sequence[RowGroup], wanted: Wanted, columns: int) -> Plan:
    """What a call with these groups of rows runs on `columns` columns."""
    sides = [side for side in (problem.teacher, problem.reference) if side is not None]
    settings = problem.settings
    narrow = problem.weight.dtype != problem.compute_dtype
    copied = settings.backend == "cpu" and narrow
    return plan_groups(
        groups,
        problem.weight.shape[1],
        max(columns, 1),
        temperatures=1 if settings.one_temperature else 2,
        student_gradient=wanted.student,
        weight_gradient=wanted.weight,
        accumulated=problem.weight_grad_out is not None,
        sparse=settings.sparse_tolerance is not None,
        copied_heads=int(copied) * (1 + sum(not side.shared_head for side in sides)),
        element_bytes=torch.finfo(problem.compute_dtype).bits // 8,
        max_chunk_bytes=settings.max_chunk_bytes,
        gradient_bytes=problem.weight.element_size() if narrow and not copied else 0,
        compiled=compiler_found(),
        backend=settings.backend,
        precision=settings.precision,
    )


def allocate(
    problem: Problem, wanted: Wanted, plan: Plan, *, sides: int, columns: int
) -> Workspace:
    """The workspace of a plan; `sides` is the most that a group of rows has."""
    operand = operand_dtype(problem)
    narrow = operand != problem.compute_dtype

    def rows_of(count: int, dtype: torch.dtype) -> Tensor:
        return new_rows(problem, count * plan.rows_per_chunk, columns, dtype)

    two = any(wanted) and not problem.settings.one_temperature
    return Workspace(
        heads=_heads(problem, columns, operand),
        buffers=rows_of(sides, problem.compute_dtype),
        gradient=rows_of(1, operand) if narrow and any(wanted) else None,
        second=rows_of(1, operand) if two else None,
    )


def _heads(problem: Problem, columns: int, dtype: torch.dtype) -> Heads:
    def operand(side: Side | None) -> Tensor:
        if side is None or side.shared_head:
            return student
        return side.weight[:columns].to(dtype)

    student = problem.weight[:columns].detach().to(dtype)
    return Heads(student, operand(problem.teacher), operand(problem.reference))


def simulate(problem: Problem, wanted: Wanted) -> Workspace | None:
    """The workspace of a call of which only shapes are known, as if every row had a weight.

    None where shapes are symbols: a plan of them would tie a compiled graph to their values.
    """
    count, rows = problem.student.shape[0], problem.weight.shape[0]  # len() would fix a symbol
    if not (isinstance(count, int) and isinstance(rows, int) and count):
        return None
    columns = rows if problem.settings.group else problem.settings.vocab_size
    sides = 1 + (problem.teacher is not None) + (problem.reference is not None)
    plan = plan_of(problem, [RowGroup(count, sides)], wanted, columns)
    return allocate(problem, wanted, plan, sides=sides, columns=columns)
