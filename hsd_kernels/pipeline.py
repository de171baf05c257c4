"""The order of work: GEMM, row_stats, token loss, row_grad, two GEMMs; chunk after chunk.

It knows no divergence: what a row's statistics mean is in `statistics`, how a loss reads them in
`token_losses`, how they are computed in `rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.passes import (
    Group,
    as_difference,
    chunk_passes,
    merged_statistics,
    row_inputs,
)
from hsd_kernels.plan import Plan, RowGroup, plan_groups
from hsd_kernels.problem import Problem, Side
from hsd_kernels.rows.torch_rows import compiler_found, row_grad, row_stats
from hsd_kernels.statistics import DIFFERENTIABLE, Row, coefficients, named_statistics


@dataclass
class Solution:
    """Loss (), statistics by name (N,) with NaN in rows that were not computed, and gradients."""

    loss: Tensor
    statistics: dict[str, Tensor]
    gradient_mass: Tensor | None  # (N,) L1 norm of each row's logit gradient
    student_grad: Tensor | None  # (N, D)
    weight_grad: Tensor | None  # (V, D)
    bias_grad: Tensor | None  # (V,)


class Wanted(NamedTuple):
    """Which gradients the caller needs."""

    student: bool
    weight: bool
    bias: bool


class Schedule(NamedTuple):
    """Which rows run with what, and the plan that follows from it."""

    groups: list[Group]
    wanted: Wanted
    plan: Plan


class Heads(NamedTuple):
    """The heads in the compute dtype."""

    student: Tensor  # (V, D)
    teacher: Tensor
    reference: Tensor


def make_schedule(problem: Problem, wanted: Wanted) -> Schedule:
    """Decides what runs. Waits for the device once, for the number of rows in each group."""
    groups = _groups(problem)
    return Schedule(groups, wanted, _plan(problem, groups, wanted))


def solve(problem: Problem, schedule: Schedule) -> Solution:
    """Loss, statistics and the wanted gradients, without ever holding N x V logits."""
    heads = _heads(problem)
    solution = _empty_solution(problem, schedule.wanted)
    buffers = _allocate(problem, schedule)
    for group in schedule.groups:
        for rows in torch.split(group.rows, schedule.plan.rows_per_chunk):
            _chunk(problem, schedule, group, rows, heads, buffers, solution)
    return solution


def _groups(problem: Problem) -> list[Group]:
    """Active rows by what they need; a row whose KL weighs nothing enters no teacher GEMM."""
    with_teacher, with_reference = problem.needs_teacher, problem.needs_reference
    groups = []
    for teacher in (problem.teacher, None) if problem.teacher else (None,):
        for reference in (problem.reference, None) if problem.reference else (None,):
            chosen = problem.active & (with_teacher == (teacher is not None))
            chosen &= with_reference == (reference is not None)
            rows = chosen.nonzero().squeeze(-1)
            if rows.numel():
                groups.append(Group(rows, teacher, reference))
    return groups


def _heads(problem: Problem) -> Heads:
    def compute(side: Side | None) -> Tensor:
        if side is None or side.shared_head:
            return student
        return side.weight.to(problem.compute_dtype)

    student = problem.weight.detach().to(problem.compute_dtype)
    return Heads(student, compute(problem.teacher), compute(problem.reference))


def _plan(problem: Problem, groups: list[Group], wanted: Wanted) -> Plan:
    sides = [side for side in (problem.teacher, problem.reference) if side is not None]
    narrow = problem.weight.dtype != problem.compute_dtype
    return plan_groups(
        [RowGroup(group.rows.numel(), group.sides) for group in groups],
        problem.weight.shape[1],
        problem.weight.shape[0],
        temperatures=1 if problem.one_temperature else 2,
        student_gradient=wanted.student,
        weight_gradient=wanted.weight,
        copied_heads=int(narrow) * (1 + sum(not side.shared_head for side in sides)),
        element_bytes=torch.finfo(problem.compute_dtype).bits // 8,
        max_chunk_bytes=problem.max_chunk_bytes,
        compiled=compiler_found(),
        precision=problem.precision,
    )


def _empty_solution(problem: Problem, wanted: Wanted) -> Solution:
    count, hidden_size = problem.student.shape
    vocab_size = problem.weight.shape[0]
    new = problem.student.new_zeros
    dtype = problem.compute_dtype
    nan = torch.full((len(Row), count), torch.nan, dtype=dtype, device=problem.student.device)
    return Solution(
        loss=new((), dtype=dtype),
        statistics=named_statistics(nan),
        gradient_mass=nan[0].clone() if any(wanted) else None,
        student_grad=new((count, hidden_size), dtype=dtype) if wanted.student else None,
        weight_grad=new((vocab_size, hidden_size), dtype=dtype) if wanted.weight else None,
        bias_grad=new((vocab_size,), dtype=dtype) if wanted.bias else None,
    )


def _allocate(problem: Problem, schedule: Schedule) -> Tensor:
    """The logits of one chunk, all sides stacked: (sides * rows_per_chunk, V), reused."""
    sides = max((g.sides for g in schedule.groups), default=1)
    return torch.empty(
        (sides * schedule.plan.rows_per_chunk, problem.weight.shape[0]),
        dtype=problem.compute_dtype,
        device=problem.student.device,
    )


def _chunk(
    problem: Problem,
    schedule: Schedule,
    group: Group,
    rows: Tensor,
    heads: Heads,
    buffers: Tensor,
    solution: Solution,
) -> None:
    """Everything for one chunk of rows; adds its share to `solution`."""
    hidden = problem.student[rows].detach().to(problem.compute_dtype)
    logits = _logits(problem, group, rows, hidden, heads, buffers)
    wanted, fused = any(schedule.wanted), schedule.plan.fused
    passes = chunk_passes(problem, group)
    inputs = [row_inputs(problem, each, rows, logits) for each in passes]
    computed = [row_stats(p.spec, x, fused=fused) for p, x in zip(passes, inputs, strict=True)]

    statistics = merged_statistics(computed)
    token_inputs = {name: value[rows] for name, value in problem.inputs.items()}
    loss, gradients = _token_loss(problem, statistics, token_inputs, differentiate=wanted)
    solution.loss += loss
    for name, value in statistics.items():
        solution.statistics[name][rows] = value
    if not wanted:
        return

    # Written in place; a second pass has a buffer of its own and goes first, to read the logits.
    targets = [logits[0], *(torch.empty_like(logits[0]) for _ in passes[1:])]
    for each, x, target, values in reversed(
        list(zip(passes, inputs, targets, computed, strict=True))
    ):
        own = {name: gradients[name] for name in each.statistics if name in gradients}
        along = coefficients(own, values, jsd_complement=x.jsd_complement)
        mass = row_grad(each.spec, x, values, along, target, fused=fused)
    gradient, *others = targets
    for other in others:
        mass = gradient.add_(other).abs().sum(-1)
    _accumulate(solution, gradient, mass, hidden, rows, heads)


def _logits(
    problem: Problem, group: Group, rows: Tensor, hidden: Tensor, heads: Heads, buffers: Tensor
) -> list[Tensor]:
    """Raw logits (C, V) of the student, then of each side, a difference where it shares the head.

    All that goes through one head is one GEMM.
    """
    count = rows.numel()
    sides = [
        (side, head)
        for side, head in ((group.teacher, heads.teacher), (group.reference, heads.reference))
        if side is not None
    ]
    # In the buffer, differences come right after the student: they share its GEMM.
    sides.sort(key=lambda pair: not as_difference(problem, pair[0]))
    blocks = torch.split(buffers[: (1 + len(sides)) * count], count)
    stacked = [hidden]
    for (side, head), block in zip(sides, blocks[1:], strict=True):
        other = side.hidden[rows].to(problem.compute_dtype)
        if as_difference(problem, side):
            stacked.append(hidden - other)
            continue
        torch.mm(other, head.t(), out=block)
        if side.bias is not None:
            block += side.bias
    torch.mm(torch.cat(stacked), heads.student.t(), out=buffers[: len(stacked) * count])
    if problem.bias is not None:
        blocks[0].add_(problem.bias.detach())
    if problem.precision == "bf16_logits":
        for block in blocks:
            block.copy_(block.bfloat16())
    order = {id(side): block for (side, _), block in zip(sides, blocks[1:], strict=True)}
    given = (side for side in (group.teacher, group.reference) if side is not None)
    return [blocks[0], *(order[id(side)] for side in given)]


def _token_loss(
    problem: Problem,
    statistics: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    differentiate: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chunk's loss (), and its derivative by each differentiable statistic, (C,) each."""

    def total(differentiable: dict[str, Tensor]) -> Tensor:
        return problem.loss({**statistics, **differentiable}, inputs).sum()

    variables = {name: statistics[name] for name in DIFFERENTIABLE}
    if not differentiate:
        return total(variables), {}
    # autograd does not run inside a custom function; torch.func does.
    gradients, loss = torch.func.grad_and_value(total)(variables)
    return loss, gradients


def _accumulate(
    solution: Solution,
    gradient: Tensor,
    mass: Tensor,
    hidden: Tensor,
    rows: Tensor,
    heads: Heads,
) -> None:
    """The two backward GEMMs of a chunk: dX = G W and dW += G^T X."""
    if solution.gradient_mass is not None:
        solution.gradient_mass[rows] = mass
    if solution.student_grad is not None:
        solution.student_grad[rows] = gradient @ heads.student
    if solution.weight_grad is not None:
        solution.weight_grad.addmm_(gradient.t(), hidden)
    if solution.bias_grad is not None:
        solution.bias_grad += gradient.sum(0)
