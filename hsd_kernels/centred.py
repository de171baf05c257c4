"""A chunk's logits in bf16, less their centres, and columns of it in fp32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.backends import multiply
from hsd_kernels.passes import Group
from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowInputs
from hsd_kernels.workspace import new_rows

_PROBES = 128  # columns, and as many targets, that tell where a row's logits lie
_NOWHERE = 1e30  # a logit whose exp is 0, and whose products with 0 are


class Chunk(NamedTuple):
    """S sides of a chunk: the student, and the differences to the others."""

    operands: Tensor  # (S C, D) bf16
    centres: Tensor  # (S, C) fp32
    logits: list[Tensor]  # S of (C, V) bf16, less the centres
    at_targets: Tensor | None  # (S, C) fp32, less the centres
    targets: Tensor | None  # (C,) int64


class Block(NamedTuple):
    """Columns of a chunk, as the row kernels take them."""

    x: RowInputs
    columns: Tensor | None  # (K,) int64 of the vocabulary; None: all


def centred_logits(
    problem: Problem, group: Group, rows: Tensor, head: Tensor, buffers: Tensor
) -> Chunk:
    student = problem.student[rows].detach().float()
    others = [side for side in (group.teacher, group.reference) if side is not None]
    states = torch.stack([student, *(student - side.hidden[rows].float() for side in others)])
    operands = states.flatten(0, 1).to(head.dtype)
    probes = head[:: max(1, len(head) // _PROBES)]
    targets = at_targets = None
    if problem.targets is not None:
        targets = problem.targets[rows]
        # Off the CPU an impossible target is not refused: its row's weight is NaN.
        own = head[targets.clamp(0, len(head) - 1)]
        # Of what is multiplied: what rounding does to a row's sums cancels in its log-probs.
        at_targets = (operands.view_as(states).float() * own.float()).sum(-1)
        probes = torch.cat([probes, own[:: max(1, len(own) // _PROBES)]])
    factor = problem.settings.logit_scale / problem.temperature[rows]
    found = torch.mm(operands, probes.t()).view(len(states), len(rows), -1)
    if at_targets is not None:
        found = torch.cat([found, at_targets[..., None].to(found.dtype)], dim=-1)
    centres = _means(found, factor).to(head.dtype).float()
    logits = buffers[: len(operands)]
    logits.copy_(-centres.flatten()[:, None])
    logits.addmm_(operands, head.t())
    return Chunk(
        operands=operands,
        centres=centres,
        logits=list(torch.split(logits, len(rows))),
        at_targets=None if at_targets is None else at_targets - centres,
        targets=targets,
    )


def _means(logits: Tensor, factor: Tensor) -> Tensor:
    """(S, C) means of raw logits (S, C, P), as the first side's distribution weighs them."""
    share = torch.softmax(logits[0] * factor[:, None], dim=-1)
    return torch.stack([(share * side).sum(-1) for side in logits])


def refined(
    problem: Problem, chunk: Chunk, x: RowInputs, head: Tensor, columns: Tensor
) -> list[Block]:
    """The chunk without `columns`, and these in fp32."""
    exact = new_rows(problem, len(chunk.operands), len(columns), torch.float32)
    multiply(chunk.operands, head[columns].t(), exact)
    exact -= chunk.centres.flatten()[:, None]
    nowhere = -math.copysign(_NOWHERE, problem.settings.logit_scale)
    x.student.index_fill_(1, columns, nowhere)
    logits = iter(torch.split(exact, len(x.student)))
    inside = outside = None
    if chunk.targets is not None:
        place = torch.searchsorted(columns, chunk.targets).clamp(max=len(columns) - 1)
        found = columns[place] == chunk.targets
        inside = torch.where(found, place, -1)
        outside = torch.where(found, -1, chunk.targets)
    fine = x._replace(
        student=next(logits),
        teacher=None if x.teacher is None else next(logits),
        reference=None if x.reference is None else next(logits),
        targets=inside,
    )
    return [Block(x._replace(targets=outside), None), Block(fine, columns)]
