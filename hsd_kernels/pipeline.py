"""The order of work: GEMM, row statistics, token loss, row gradient, two GEMMs; chunk by chunk.

It knows no divergence: what a row's statistics mean is in `statistics`, how a loss reads them in
`token_losses`, how they are computed in `rows`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hsd_kernels.accumulation import Solution, Work, accumulate, empty_solution
from hsd_kernels.backends import kernels_of, multiply
from hsd_kernels.differentiation import token_loss
from hsd_kernels.half import gradient_scale, multiply_sums
from hsd_kernels.parallel import shard_of
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
from hsd_kernels.precision import formed as refined_chunk
from hsd_kernels.problem import Problem
from hsd_kernels.statistics import STATISTICS, coefficients
from hsd_kernels.top_k import TopK, most_likely
from hsd_kernels.workspace import (
    Wanted,
    allocate,
    operand_dtype,
    plan_of,
    resolved,
    row_group,
    with_fp32_logits,
    within,
)


def solve(problem: Problem, wanted: Wanted) -> Solution:
    """Loss, statistics and the wanted gradients, without ever holding N x V logits.

    Waits for the device once, for the number of rows in each group of rows.
    """
    problem = resolved(problem, wanted)
    settings, device = problem.settings, problem.student.device
    shard = shard_of(settings.group, len(problem.weight), settings.vocab_size, device)
    groups = _groups(problem)
    counts = [row_group(problem, group.rows.numel(), group.others) for group in groups]
    plan = plan_of(problem, counts, wanted, shard.largest)
    sides = max((group.sides for group in groups), default=1)
    work = Work(
        problem=problem,
        wanted=wanted,
        shard=shard,
        plan=plan,
        kernels=kernels_of(problem, fused=plan.fused),
        memory=allocate(problem, wanted, plan, sides=sides, columns=shard.columns),
        scale=gradient_scale(problem, wanted) if groups else None,
    )
    solution = empty_solution(problem, wanted, plan, columns=shard.columns if groups else 0)
    if work.scale is not None and solution.weight_grad_started:
        multiply_sums(solution, work.scale, used=shard.columns)
    for group in groups:
        for rows in torch.split(group.rows, plan.rows_per_chunk):
            _chunk(work, group, rows, solution)
    if work.scale is not None:
        multiply_sums(solution, work.scale.reciprocal(), used=shard.columns)
    for shared in (solution.student_grad, solution.mass if any(wanted) else None):
        if shared is not None:
            shard.sum_(shared)
    if problem.weight_grad_out is not None:
        solution.weight_grad = None
    return solution


def _groups(problem: Problem) -> list[Group]:
    """Active rows by what they need; a row whose KL weighs nothing enters no teacher GEMM."""
    lacks_teacher, lacks_reference = ~problem.needs_teacher, ~problem.needs_reference
    kind = torch.where(problem.active, 2 * lacks_teacher + lacks_reference, 4)
    counts = (kind == torch.arange(4, device=kind.device)[:, None]).sum(-1).tolist()  # waits
    order = torch.argsort(kind, stable=True)
    groups, first = [], 0
    for index, count in enumerate(counts):
        rows = order[first : first + count]
        first += count
        if count:
            teacher = None if index >= 2 else problem.teacher
            groups.append(Group(rows, teacher, None if index % 2 else problem.reference))
    return groups


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
            heads=memory.heads,
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
        accumulate(work, solution, found.gradient, hidden, rows)


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

    if work.scale is not None:
        gradients = {name: gradient * work.scale for name, gradient in gradients.items()}
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
