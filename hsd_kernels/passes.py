"""How a chunk of rows is read: which sides, in which form, at which temperature."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.problem import Problem, Side
from hsd_kernels.rows import RowInputs, RowSpec, Source
from hsd_kernels.statistics import DIFFERENTIABLE, named_statistics


class Group(NamedTuple):
    """Rows that need the same sides."""

    rows: Tensor  # (n,) int64, ascending
    teacher: Side | None
    reference: Side | None

    @property
    def sides(self) -> int:
        return 1 + (self.teacher is not None) + (self.reference is not None)


class Pass(NamedTuple):
    """One reading of a chunk at one temperature; the KLs may have one of their own."""

    spec: RowSpec
    temperature: Tensor  # (N,)
    statistics: tuple[str, ...]  # the differentiable statistics that this pass provides


def as_difference(problem: Problem, side: Side) -> bool:
    return side.shared_head and problem.precision != "bf16_logits"


def chunk_passes(problem: Problem, group: Group) -> list[Pass]:
    """One pass, or two where the KLs have a temperature of their own."""
    policy = ("lse", "logprob", "entropy")
    target = problem.targets is not None
    divergence = problem.loss.divergence if group.teacher else None

    def source(side: Side | None) -> Source:
        if side is None:
            return "absent"
        return "difference" if as_difference(problem, side) else "logits"

    whole = RowSpec(
        teacher=source(group.teacher),
        reference=source(group.reference),
        forward_kl=divergence == "forward_kl",
        reverse_kl=divergence == "reverse_kl",
        jsd=divergence == "jsd",
        target=target,
        softcap=problem.logit_softcap is not None,
        same_temperature=problem.teacher_shares_temperature,
    )
    if problem.one_temperature or (group.teacher is None and group.reference is None):
        return [Pass(whole, problem.temperature, DIFFERENTIABLE)]
    plain = RowSpec(target=target, softcap=whole.softcap)
    return [
        Pass(plain, problem.temperature, policy),
        Pass(
            whole,
            problem.kl_temperature,
            tuple(name for name in DIFFERENTIABLE if name not in policy),
        ),
    ]


def row_inputs(problem: Problem, each: Pass, rows: Tensor, logits: list[Tensor]) -> RowInputs:
    remaining = iter(logits)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=problem.compute_dtype, device=logits[0].device)

    return RowInputs(
        student=next(remaining),
        teacher=next(remaining) if each.spec.teacher != "absent" else None,
        reference=next(remaining) if each.spec.reference != "absent" else None,
        targets=None if problem.targets is None else problem.targets[rows],
        inverse_temperature=each.temperature[rows].reciprocal(),
        teacher_inverse_temperature=problem.teacher_temperature[rows].reciprocal(),
        logit_scale=number(problem.logit_scale),
        softcap=number(problem.logit_softcap or 1.0),
        jsd_beta=number(problem.jsd_beta),
        jsd_complement=number(1 - problem.jsd_beta),
    )


def merged_statistics(computed: list[Tensor]) -> dict[str, Tensor]:
    """Statistics by name: log-probs and entropy of the first pass, KLs and teacher of the last."""
    first, last = named_statistics(computed[0]), named_statistics(computed[-1])
    return last | {name: first[name] for name in ("lse", "logprob", "entropy")}
