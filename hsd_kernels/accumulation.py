"""What the chunks of a call add up to, and the matrix products by which a gradient gets there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hsd_kernels.backends import multiply, multiply_add
from hsd_kernels.parallel import Shard
from hsd_kernels.plan import Plan
from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowKernels
from hsd_kernels.sparse import kept_columns
from hsd_kernels.statistics import STATISTICS
from hsd_kernels.top_k import TopK
from hsd_kernels.workspace import Wanted, Workspace


@dataclass
class Solution:
    """Loss (), statistics with 0 where they were not computed, gradients, and what ran.

    Gradients that were not wanted are None; so is the head's where the caller gave an accumulator.
    """

    loss: Tensor
    statistics: Tensor  # (len(STATISTICS), N)
    mass: Tensor  # (3, N) L1 norm of a row's logit gradient, the part dropped, its columns kept
    top: TopK  # (2, N, k) student's and teacher's
    student_grad: Tensor | None  # (N, D)
    weight_grad: Tensor | None  # (V', D); before `weight_grad_started` anything
    weight_grad_started: bool
    bias_grad: Tensor | None  # (V',)
    plan: Plan


@dataclass
class Work:
    """What every chunk of a call uses."""

    problem: Problem
    wanted: Wanted
    shard: Shard
    plan: Plan
    kernels: RowKernels
    memory: Workspace
    scale: Tensor | None  # () that logit gradients in fp16 are multiplied by
    fp32: Work | None = None  # of the chunks that bf16 logits do not do for


def empty_solution(problem: Problem, wanted: Wanted, plan: Plan, *, columns: int) -> Solution:
    """Before the first chunk; `columns` of the head's gradient are what it overwrites."""
    count, hidden_size = problem.student.shape
    rows = problem.weight.shape[0]
    new, dtype = problem.student.new_zeros, problem.compute_dtype
    head_grad = problem.weight_grad_out
    if wanted.weight and head_grad is None:
        head_grad = problem.student.new_empty((rows, hidden_size), dtype=dtype)
        head_grad[columns:].zero_()
    return Solution(
        loss=new((), dtype=dtype),
        statistics=new((len(STATISTICS), count), dtype=dtype),
        mass=new((3, count), dtype=dtype),
        top=TopK.empty(problem),
        student_grad=new((count, hidden_size), dtype=dtype) if wanted.student else None,
        weight_grad=head_grad if wanted.weight else None,
        bias_grad=new((rows,), dtype=dtype) if wanted.bias else None,
        weight_grad_started=problem.weight_grad_out is not None or not columns,
        plan=plan,
    )


def accumulate(
    work: Work, solution: Solution, gradient: Tensor, hidden: Tensor, rows: Tensor
) -> None:
    """The two backward GEMMs of a chunk, dX = G W and dW += G^T X: whole, or on kept columns."""
    settings, head = work.problem.settings, work.memory.heads.student
    rounded = settings.precision == "difference"
    columns = None
    if settings.sparse_tolerance is not None:
        column_mass, row_mass = work.kernels.masses(gradient)
        columns = kept_columns(
            column_mass,
            tolerance=settings.sparse_tolerance,
            max_columns=settings.sparse_max_columns,
        )
    if columns is not None:
        if gradient.dtype != solution.mass.dtype:  # whose rounding would pass for what is dropped
            solution.mass[0, rows] = row_mass
        gradient, head = gradient[:, columns], head[columns]
        kept = gradient.abs().sum(-1, dtype=solution.mass.dtype)
        solution.mass[1, rows] = (solution.mass[0, rows] - kept).clamp(min=0)
    solution.mass[2, rows] = gradient.shape[1]
    if solution.student_grad is not None:
        own = solution.student_grad.new_empty((len(rows), head.shape[1]))
        multiply(gradient, head, own, rounded=rounded)
        solution.student_grad[rows] = own
    if solution.bias_grad is not None:
        _add_rows(
            solution.bias_grad[: work.shard.columns],
            columns,
            gradient.sum(0, dtype=solution.bias_grad.dtype),
        )
    if solution.weight_grad is None:
        return
    used, started = solution.weight_grad[: work.shard.columns], solution.weight_grad_started
    solution.weight_grad_started = True
    if columns is None:
        add = multiply_add if started else multiply
        add(gradient.t(), hidden, used, product=work.memory.product)
        return
    if not started:
        used.zero_()
    part = used.new_empty((len(columns), hidden.shape[1]))
    multiply(gradient.t(), hidden, part, rounded=rounded)
    _add_rows(used, columns, part)


def _add_rows(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    if rows is None:
        total += part
    else:
        total.index_add_(0, rows, part)
