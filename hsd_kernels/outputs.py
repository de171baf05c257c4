"""What the public losses return."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.plan import Plan, from_record
from hsd_kernels.problem import Problem
from hsd_kernels.statistics import DIVERGENCES
from hsd_kernels.token_losses import HSD_LOSS


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """Detached per-token numbers in nats, in the leading shape of the inputs.

    fp32 (fp64 for fp64 inputs). Rows that were not computed (weight 0) are NaN; a field whose
    inputs were not given is None.

    Attributes:
        kl: the divergence asked for, before weights and cap; None with a loss of one's own.
        forward_kl, reverse_kl, jsd: those that a loss of one's own reads; else None.
        ref_kl: KL(student || reference).
        logprob, teacher_logprob: of the target.
        entropy, teacher_entropy: of the whole vocabulary.
        lse, teacher_lse: logsumexp of the logits.
        top1_agree: 1 where both sides share their most likely token, else 0.
        gradient_mass: L1 norm of the token's logit gradient; None where none was formed.
        dropped_mass: the part of it that a sparse backward dropped.
        kept_columns: of the vocabulary, that the backward of the token's chunk ran on.
        computed: bool, whether the row entered the computation.
        top_ids, top_logprobs, teacher_top_ids, teacher_top_logprobs: (..., top_k) the most likely
            tokens of each side, -1 and NaN where not computed; None with top_k 0.
    """

    kl: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    jsd: Tensor | None
    ref_kl: Tensor | None
    logprob: Tensor | None
    teacher_logprob: Tensor | None
    entropy: Tensor
    teacher_entropy: Tensor | None
    lse: Tensor
    teacher_lse: Tensor | None
    top1_agree: Tensor | None
    gradient_mass: Tensor | None
    dropped_mass: Tensor | None
    kept_columns: Tensor | None
    computed: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    teacher_top_ids: Tensor | None
    teacher_top_logprobs: Tensor | None


_STATISTICS_FIELDS = tuple(field.name for field in fields(TokenStatistics))
_OF_GRADIENT = ("gradient_mass", "dropped_mass", "kept_columns")


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns: the differentiable loss (), statistics, and what ran."""

    loss: Tensor
    stats: TokenStatistics
    plan_record: Tensor

    @property
    def plan(self) -> Plan:
        """What ran."""
        return from_record(self.plan_record)


def output(
    problem: Problem,
    lead: torch.Size,
    loss: Tensor,
    statistics: dict[str, Tensor],
    plan_record: Tensor,
    *,
    mass: Tensor | None,
    top_ids: Tensor | None = None,
    top_logprobs: Tensor | None = None,
) -> LossOutput:
    """Gives the statistics their public names, their shape, and NaN where nothing was computed.

    Args:
        problem: the call.
        lead: leading shape of the inputs.
        loss: ().
        statistics: name -> (N,).
        plan_record: of the plan that ran.
        mass: (3, N) in the order of `_OF_GRADIENT`; None where no gradient was formed.
        top_ids, top_logprobs: (2, N, k) of student and teacher.
    """
    rows = _computed_rows(problem)
    values: dict[str, Any] = dict.fromkeys(_STATISTICS_FIELDS)
    if problem.settings.loss == HSD_LOSS and problem.settings.divergence:
        kl = problem.settings.loss_scalars[0] * statistics[problem.settings.divergence]
        statistics = {**statistics, "kl": kl}
    if mass is not None:
        statistics = {**statistics, **dict(zip(_OF_GRADIENT, mass, strict=True))}
        rows |= dict.fromkeys(_OF_GRADIENT, problem.active)
    for name, computed in rows.items():
        values[name] = statistics[name].detach().where(computed, torch.nan).reshape(lead)
    values["computed"] = problem.active.reshape(lead)
    if top_ids is not None and top_logprobs is not None and problem.settings.top_k:
        top_logprobs = top_logprobs.where(top_ids >= 0, torch.nan)
        for side, prefix in ((0, ""), (1, "teacher_"))[: 1 + (problem.teacher is not None)]:
            shape = (*lead, problem.settings.top_k)
            values[f"{prefix}top_ids"] = top_ids[side].reshape(shape)
            values[f"{prefix}top_logprobs"] = top_logprobs[side].reshape(shape)
    return LossOutput(loss=loss, stats=TokenStatistics(**values), plan_record=plan_record)


def _computed_rows(problem: Problem) -> dict[str, Tensor]:
    """Public name -> (N,) bool, the rows in which that statistic was computed."""
    rows = {}
    for name in problem.statistics:
        if name in ("lse", "entropy", "logprob"):
            rows[name] = problem.active
        elif name == "ref_kl":
            rows[name] = problem.needs_reference
        elif name not in DIVERGENCES:
            rows[name] = problem.needs_teacher
        elif problem.settings.loss == HSD_LOSS:
            rows["kl"] = problem.needs_teacher
        else:
            rows[name] = problem.needs_teacher
    return rows
