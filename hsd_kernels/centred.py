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
from hsd_kernels.workspace import Heads, new_rows

_PROBES = 128  # columns, and as many targets, that tell where a row's logits lie
_NOWHERE = 1e30  # a logit whose exp is 0, and whose products with 0 are


class Product(NamedTuple):
    """Logits or differences of them, before they are centred: operand @ head.T."""

    operand: Tensor  # (C, K) bf16
    head: Tensor  # (V, K) bf16


class Chunk(NamedTuple):
    """S sides of a chunk: the student, and the differences to the others."""

    products: list[Product]  # S
    centres: Tensor  # (S, C) fp32
    logits: list[Tensor]  # S of (C, V) bf16, less the centres
    at_targets: Tensor | None  # (S, C) fp32, less the centres
    targets: Tensor | None  # (C,) int64


class Block(NamedTuple):
    """Columns of a chunk, as the row kernels take them."""

    x: RowInputs
    columns: Tensor | None  # (K,) int64 of the vocabulary; None: all


def centred_logits(
    problem: Problem, group: Group, rows: Tensor, heads: Heads, buffers: Tensor
) -> Chunk:
    products = _products(problem, group, rows, heads)
    targets = at_targets = None
    if problem.targets is not None:
        targets = problem.targets[rows]
        # Of what is multiplied: what rounding does to a row's sums cancels in its log-probs.
        at_targets = torch.stack([_at_targets(each, targets) for each in products])
    probed = [_probed(each, targets) for each in products]
    if at_targets is not None:
        probed = [
            torch.cat([found, own[:, None].to(found.dtype)], dim=-1)
            for found, own in zip(probed, at_targets, strict=True)
        ]
    factor = problem.settings.logit_scale / problem.temperature[rows]
    centres = _means(torch.stack(probed), factor).to(heads.student.dtype).float()
    return Chunk(
        products=products,
        centres=centres,
        logits=_multiplied(products, centres, buffers),
        at_targets=None if at_targets is None else at_targets - centres,
        targets=targets,
    )


def _products(problem: Problem, group: Group, rows: Tensor, heads: Heads) -> list[Product]:
    student, dtype = problem.student[rows].detach(), heads.student.dtype
    products = [Product(student.to(dtype), heads.student)]
    for side, head in ((group.teacher, heads.teacher), (group.reference, heads.reference)):
        if side is None:
            continue
        own = side.hidden[rows]
        if side.shared_head:
            products.append(Product((student.float() - own.float()).to(dtype), head))
        else:
            products.append(Product(torch.cat([student, -own], dim=-1).to(dtype), head))
    return products


def _at_targets(product: Product, targets: Tensor) -> Tensor:
    """(C,) fp32; off the CPU an impossible target is not refused: its row's weight is NaN."""
    own = product.head[targets.clamp(0, len(product.head) - 1)]
    return (product.operand.float() * own.float()).sum(-1)


def _probed(product: Product, targets: Tensor | None) -> Tensor:
    """(C, P) at some columns, those of some targets among them."""
    operand, head = product
    probes = head[:: max(1, len(head) // _PROBES)]
    if targets is not None:
        some = targets[:: max(1, len(targets) // _PROBES)].clamp(0, len(head) - 1)
        probes = torch.cat([probes, head[some]])
    return torch.mm(operand, probes.t())


def _multiplied(products: list[Product], centres: Tensor, buffers: Tensor) -> list[Tensor]:
    """S of (C, V), all that goes through the student's head in one product."""
    count, head = len(products[0].operand), products[0].head
    shared = [each.head is head for each in products]
    order = sorted(range(len(products)), key=lambda i: not shared[i])
    blocks = dict(zip(order, torch.split(buffers[: len(order) * count], count), strict=True))
    for i, block in blocks.items():
        block.copy_(-centres[i][:, None])
    stacked = torch.cat([products[i].operand for i in order if shared[i]])
    buffers[: len(stacked)].addmm_(stacked, head.t())
    for i in order[sum(shared) :]:
        blocks[i].addmm_(products[i].operand, products[i].head.t())
    return [blocks[i] for i in range(len(products))]


def _means(logits: Tensor, factor: Tensor) -> Tensor:
    """(S, C) means of raw logits (S, C, P), as the first side's distribution weighs them."""
    share = torch.softmax(logits[0] * factor[:, None], dim=-1)
    return torch.stack([(share * side).sum(-1) for side in logits])


def refined(problem: Problem, chunk: Chunk, x: RowInputs, columns: Tensor) -> list[Block]:
    """The chunk without `columns`, and these in fp32."""
    count = len(x.student)
    exact = new_rows(problem, len(chunk.products) * count, len(columns), torch.float32)
    for (operand, head), out in zip(chunk.products, torch.split(exact, count), strict=True):
        multiply(operand, head[columns].t(), out)
    exact -= chunk.centres.flatten()[:, None]
    nowhere = -math.copysign(_NOWHERE, problem.settings.logit_scale)
    x.student.index_fill_(1, columns, nowhere)
    logits = iter(torch.split(exact, count))
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
