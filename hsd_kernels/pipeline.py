"""The order of work: GEMM, row statistics, token loss, row gradient, two GEMMs; chunk by chunk.

It knows no divergence: what a row's statistics mean is in `statistics`, how a loss reads them in
`token_losses`, how they are computed in `rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsd_kernels.backends import kernels_of, multiply, multiply_add
from hsd_kernels.differentiation import token_loss
from hsd_kernels.parallel import Shard, shard_of
from hsd_kernels.passes import (
    Formed,
    Group,
    as_difference,
    chunk_passes,
    chunk_statistics,
    merged_statistics,
    provided_statistics,
    row_inputs,
)
from hsd_kernels.plan import Plan, RowGroup
from hsd_kernels.precision import formed as refined_chunk
from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowKernels
from hsd_kernels.sparse import kept_columns
from hsd_kernels.statistics import STATISTICS, coefficients
from hsd_kernels.top_k import TopK, most_likely
from hsd_kernels.workspace import (
    Wanted,
    Workspace,
    allocate,
    operand_dtype,
    plan_of,
    resolved,
    with_fp32_logits,
    within,
)


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
    weight_grad: Tensor | None  # (V', D)
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
    fp32: Work | None = None  # of the chunks that bf16 logits do not do for


def solve(problem: Problem, wanted: Wanted) -> Solution:
    """Loss, statistics and the wanted gradients, without ever holding N x V logits.

    Waits for the device once, for the number of rows in each group of rows.
    """
    problem = resolved(problem, wanted)
    settings, device = problem.settings, problem.student.device
    shard = shard_of(settings.group, len(problem.weight), settings.vocab_size, device)
    groups = _groups(problem)
    counts = [RowGroup(group.rows.numel(), group.sides) for group in groups]
    plan = plan_of(problem, counts, wanted, shard.largest)
    sides = max((group.sides for group in groups), default=1)
    work = Work(
        problem=problem,
        wanted=wanted,
        shard=shard,
        plan=plan,
        kernels=kernels_of(problem, fused=plan.fused),
        memory=allocate(problem, wanted, plan, sides=sides, columns=shard.columns),
    )
    solution = _empty_solution(problem, wanted, plan)
    for group in groups:
        for rows in torch.split(group.rows, plan.rows_per_chunk):
            _chunk(work, group, rows, solution)
    for shared in (solution.student_grad, solution.mass if any(wanted) else None):
        if shared is not None:
            shard.sum_(shared)
    if problem.weight_grad_out is not None:
        solution.weight_grad = None
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


def _empty_solution(problem: Problem, wanted: Wanted, plan: Plan) -> Solution:
    count, hidden_size = problem.student.shape
    rows = problem.weight.shape[0]
    new, dtype = problem.student.new_zeros, problem.compute_dtype
    head_grad = problem.weight_grad_out
    if wanted.weight and head_grad is None:
        head_grad = new((rows, hidden_size), dtype=dtype)
    return Solution(
        loss=new((), dtype=dtype),
        statistics=new((len(STATISTICS), count), dtype=dtype),
        mass=new((3, count), dtype=dtype),
        top=TopK.empty(problem),
        student_grad=new((count, hidden_size), dtype=dtype) if wanted.student else None,
        weight_grad=head_grad if wanted.weight else None,
        bias_grad=new((rows,), dtype=dtype) if wanted.bias else None,
        plan=plan,
    )


def _chunk(work: Work, group: Group, rows: Tensor, solution: Solution) -> None:
    """Everything for one chunk of rows; adds its share to `solution`."""
    problem, memory = work.problem, work.memory
    hidden = problem.student[rows].detach().to(operand_dtype(problem))
    if problem.settings.precision == "difference":
        found = refined_chunk(
            problem,
            work.kernels,
            group,
            rows,
            head=memory.heads.student,
            buffers=memory.buffers,
            differentiate=any(work.wanted),
        )
        if found is None:
            _chunk_in_fp32(work, group, rows, solution)
            return
    else:
        found = _formed(work, group, rows, hidden, solution.top)
    solution.loss += found.loss
    for name in provided_statistics(problem, group):
        solution.statistics[STATISTICS.index(name), rows] = found.statistics[name]
    refined = solution.plan.refined_columns + found.refined
    solution.plan = replace(solution.plan, refined_columns=refined)
    if found.gradient is not None and found.mass is not None:
        solution.mass[0, rows] = found.mass
        _accumulate(work, solution, found.gradient, hidden, rows)


def _chunk_in_fp32(work: Work, group: Group, rows: Tensor, solution: Solution) -> None:
    """A chunk whose bf16 logits do not do, in the same memory."""
    if work.fp32 is None:
        problem = with_fp32_logits(work.problem)
        sides = len(work.memory.buffers) // work.plan.rows_per_chunk
        memory, count = within(problem, work.memory, sides=sides)
        plan = replace(work.plan, rows_per_chunk=count)
        work.fp32 = replace(work, problem=problem, plan=plan, memory=memory)
    for part in torch.split(rows, work.fp32.plan.rows_per_chunk):
        _chunk(work.fp32, group, part, solution)
    solution.plan = replace(solution.plan, repeated_chunks=solution.plan.repeated_chunks + 1)


def _formed(work: Work, group: Group, rows: Tensor, hidden: Tensor, top: TopK) -> Formed:
    """The chunk from logits that are what they are; its most likely tokens go to `top`."""
    problem, memory = work.problem, work.memory
    logits = _logits(work, group, rows, hidden)
    targets = None if problem.targets is None else work.shard.local_targets(problem.targets[rows])
    passes = chunk_passes(problem, group)
    inputs = [row_inputs(problem, each, rows, logits, targets) for each in passes]
    computed = [
        chunk_statistics(work.kernels, p.spec, x, work.shard)
        for p, x in zip(passes, inputs, strict=True)
    ]
    statistics = merged_statistics(computed)
    loss, gradients = token_loss(problem, statistics, rows, differentiate=any(work.wanted))
    if problem.settings.top_k:
        first, last = (passes[0].spec, inputs[0]), (passes[-1].spec, inputs[-1])
        most_likely(top, rows, first, last, statistics)
    if not any(work.wanted):
        return Formed(loss=loss, statistics=statistics, gradient=None, mass=None)

    # Written in place where dtypes allow; a second pass goes first, to read the logits.
    own = logits[0] if memory.gradient is None else memory.gradient[: rows.numel()]
    targets_of = [own]
    if len(passes) == 2 and memory.second is not None:
        targets_of.append(memory.second[: rows.numel()])
    for each, x, out, values in reversed(
        list(zip(passes, inputs, targets_of, computed, strict=True))
    ):
        read = {name: gradients[name] for name in each.statistics if name in gradients}
        along = coefficients(read, values, jsd_complement=x.jsd_complement)
        mass = work.kernels.grad(each.spec, x, values, along, out)
    gradient, *others = targets_of
    for other in others:
        total = gradient.add_(other)
        mass = torch.linalg.vector_norm(total, ord=1, dim=-1, dtype=problem.compute_dtype)
    return Formed(loss=loss, statistics=statistics, gradient=gradient, mass=mass)


def _logits(work: Work, group: Group, rows: Tensor, hidden: Tensor) -> list[Tensor]:
    """Raw logits (C, V) of the student, then of each side, a difference where it shares the head.

    All that goes through one head is one GEMM.
    """
    problem, heads, count = work.problem, work.memory.heads, rows.numel()
    columns = work.shard.columns
    sides = [
        (side, head)
        for side, head in ((group.teacher, heads.teacher), (group.reference, heads.reference))
        if side is not None
    ]
    # In the buffer, differences come right after the student: they share its GEMM.
    sides.sort(key=lambda pair: not as_difference(problem, pair[0]))
    blocks = torch.split(work.memory.buffers[: (1 + len(sides)) * count], count)
    stacked = [hidden]
    for (side, head), block in zip(sides, blocks[1:], strict=True):
        other = side.hidden[rows].to(operand_dtype(problem))
        if as_difference(problem, side):
            stacked.append(hidden - other)
            continue
        multiply(other, head.t(), block)
        if side.bias is not None:
            block += side.bias[:columns]
    multiply(torch.cat(stacked), heads.student.t(), work.memory.buffers[: len(stacked) * count])
    if problem.bias is not None:
        blocks[0].add_(problem.bias[:columns].detach())
    if problem.settings.precision == "bf16_logits":
        for block in blocks:
            block.copy_(block.bfloat16())
    order = {id(side): block for (side, _), block in zip(sides, blocks[1:], strict=True)}
    given = (side for side in (group.teacher, group.reference) if side is not None)
    return [blocks[0], *(order[id(side)] for side in given)]


def _accumulate(
    work: Work, solution: Solution, gradient: Tensor, hidden: Tensor, rows: Tensor
) -> None:
    """The two backward GEMMs of a chunk, dX = G W and dW += G^T X: whole, or on kept columns."""
    settings, head = work.problem.settings, work.memory.heads.student
    rounded = settings.precision == "difference"
    columns = None
    if settings.sparse_tolerance is not None:
        columns = kept_columns(
            work.kernels.column_mass(gradient),
            tolerance=settings.sparse_tolerance,
            max_columns=settings.sparse_max_columns,
        )
    if columns is not None:
        if gradient.dtype != solution.mass.dtype:  # whose rounding would pass for what is dropped
            solution.mass[0, rows] = torch.linalg.vector_norm(
                gradient, ord=1, dim=-1, dtype=solution.mass.dtype
            )
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
    used = solution.weight_grad[: work.shard.columns]
    if columns is None:
        multiply_add(used, gradient.t(), hidden, product=work.memory.product)
        return
    part = used.new_empty((len(columns), hidden.shape[1]))
    multiply(gradient.t(), hidden, part, rounded=rounded)
    _add_rows(used, columns, part)


def _add_rows(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    if rows is None:
        total += part
    else:
        total.index_add_(0, rows, part)
