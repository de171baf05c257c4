"""How a chunk of rows is read: which sides, in which form, at which temperature; what it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.parallel import Shard
from hsd_kernels.problem import Problem, Side
from hsd_kernels.rows import RowInputs, RowKernels, RowSpec, Source
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import empty_part, finish, merge
from hsd_kernels.statistics import DIFFERENTIABLE, STATISTICS, named_statistics


class Group(NamedTuple):
    """Rows that need the same sides."""

    rows: Tensor  # (n,) int64, ascending
    teacher: Side | None
    reference: Side | None

    @property
    def others(self) -> list[Side]:
        return [side for side in (self.teacher, self.reference) if side is not None]

    @property
    def sides(self) -> int:
        return 1 + len(self.others)


class Pass(NamedTuple):
    """One reading of a chunk at one temperature; the KLs may have one of their own."""

    spec: RowSpec
    temperature: Tensor  # (N,)
    statistics: tuple[str, ...]  # the differentiable statistics that this pass provides


class Formed(NamedTuple):
    """What a chunk of C rows comes to."""

    loss: Tensor  # ()
    statistics: dict[str, Tensor]  # name -> (C,)
    gradient: Tensor | None  # (C, V) of the raw logits; None where none was wanted
    mass: Tensor | None  # (C,) its L1 norm
    refined: int = 0  # columns computed again in fp32


def as_difference(problem: Problem, side: Side) -> bool:
    """Whether a side's logits come as their difference to the student's.

    Narrow operands cannot hold the difference of hidden states: it would be rounded once more.
    Where that is chosen, what it costs is within its tolerance.
    """
    settings = problem.settings
    exact = settings.backend == "cpu" or problem.student.dtype == problem.compute_dtype
    fits = side.shared_head and settings.precision != "bf16_logits" and exact
    return fits or settings.precision == "difference"


def chunk_passes(problem: Problem, group: Group) -> list[Pass]:
    """One pass, or two where the KLs have a temperature of their own."""
    policy = ("lse", "logprob", "entropy")
    target = problem.targets is not None
    settings = problem.settings
    wanted = problem.statistics if group.teacher else ()

    def source(side: Side | None) -> Source:
        if side is None:
            return "absent"
        return "difference" if as_difference(problem, side) else "logits"

    whole = RowSpec(
        teacher=source(group.teacher),
        reference=source(group.reference),
        forward_kl="forward_kl" in wanted,
        reverse_kl="reverse_kl" in wanted,
        jsd="jsd" in wanted,
        target=target,
        softcap=settings.logit_softcap is not None,
        same_temperature=settings.teacher_shares_temperature,
    )
    if settings.one_temperature or (group.teacher is None and group.reference is None):
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


def row_inputs(
    problem: Problem, each: Pass, rows: Tensor, logits: list[Tensor], targets: Tensor | None
) -> RowInputs:
    """One chunk as the row kernels take it; `targets` (C,) are columns of this shard."""
    remaining = iter(logits)
    settings = problem.settings

    def number(value: float) -> Tensor:
        # Filled on the device: a copy to it would wait for all that runs there.
        return torch.full((), value, dtype=problem.compute_dtype, device=logits[0].device)

    return RowInputs(
        student=next(remaining),
        teacher=next(remaining) if each.spec.teacher != "absent" else None,
        reference=next(remaining) if each.spec.reference != "absent" else None,
        targets=targets,
        inverse_temperature=each.temperature[rows].reciprocal(),
        teacher_inverse_temperature=problem.teacher_temperature[rows].reciprocal(),
        logit_scale=number(settings.logit_scale),
        softcap=number(settings.logit_softcap or 1.0),
        jsd_beta=number(settings.jsd_beta),
        jsd_complement=number(1 - settings.jsd_beta),
    )


def chunk_statistics(kernels: RowKernels, spec: RowSpec, x: RowInputs, shard: Shard) -> Tensor:
    """Statistics (len(Row), C) of whole rows, over the shards of all ranks."""
    if shard.group is None:
        return kernels.stats(spec, x)
    if shard.columns:
        parts = kernels.partials(spec, x, first_column=shard.first)
        own = merge(spec, parts)[None]
    else:
        own = empty_part(x.inverse_temperature)[None]
    rows = finish(spec, merge(spec, shard.gathered(own)), x)
    if not spec.jsd:
        return rows
    sums = x.inverse_temperature.new_zeros((1, 3, len(x.inverse_temperature)))
    if shard.columns:
        sums = kernels.mixture(spec, x, rows).sum(0, keepdim=True)
    return finish_mixture(rows, shard.gathered(sums), x)


def merged_statistics(computed: list[Tensor]) -> dict[str, Tensor]:
    """Statistics by name: log-probs and entropy of the first pass, KLs and teacher of the last."""
    first, last = named_statistics(computed[0]), named_statistics(computed[-1])
    return last | {name: first[name] for name in ("lse", "logprob", "entropy")}


def provided_statistics(problem: Problem, group: Group) -> tuple[str, ...]:
    """Those of the problem's statistics that a group with fewer sides has, too."""
    without = set() if group.teacher else set(STATISTICS) - {"lse", "entropy", "logprob", "ref_kl"}
    without |= set() if group.reference else {"ref_kl"}
    return tuple(name for name in problem.statistics if name not in without)
