"""What goes into the loss of a micro-batch: hidden states of each side, and what is per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hsd.policy.adapters import computing_with
from hsd.policy.head import response_hidden, routed_hidden
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The response tokens of a micro-batch, rollout behind rollout; N in all.

    Attributes:
        lengths: tokens of each rollout.
        engine_logprobs: of the engine that sampled, nats.
        taught: tokens that have a teacher.
    """

    lengths: Sequence[int]
    targets: Tensor  # (N,) int64
    weights: Tensor  # (N,)
    engine_logprobs: Tensor  # (N,)
    advantages: Tensor  # (N,)
    taught: Tensor  # (N,) bool


def response_tokens(
    policy: Policy, batch: Sequence[TrainingRow], *, device: torch.device
) -> Tokens:
    """What the rows of a micro-batch hold of each token."""

    def tensor(values: list[Any]) -> Tensor:
        return torch.tensor(values, device=device)

    return Tokens(
        lengths=[len(row.response) for row in batch],
        targets=tensor([token for row in batch for token in row.response]),
        weights=tensor([weight for row in batch for weight in row.weights]),
        engine_logprobs=tensor([value for row in batch for value in row.logprobs]),
        advantages=tensor([row.advantage for row in batch for _ in row.response]),
        taught=tensor([each for row in batch for each in _distilled(policy, row)]),
    )


def hidden_states(
    policy: Policy, batch: Sequence[TrainingRow], *, reference: bool
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """(N, D) of the policy, and (B,) what `routed_hidden` gives beside it.

    And those of teacher and reference with their heads, as arguments of `fused_hsd_loss`.
    """
    responses = [row.response for row in batch]
    student_prompts = [row.student_prompt for row in batch]
    hidden_of = partial(response_hidden, compute_dtype=policy.compute_dtype, packed=policy.packed)
    others: dict[str, Any] = {"teacher_hidden": None}
    with torch.no_grad():
        if policy.teacher is not None:
            teacher_prompts = [row.teacher_prompt for row in batch]
            with computing_with(policy.teacher, policy.teacher_adapter):
                others["teacher_hidden"] = hidden_of(policy.teacher, teacher_prompts, responses)
        if reference:
            with computing_with(policy.initial, policy.initial_adapter):
                others["ref_hidden"] = hidden_of(policy.initial, student_prompts, responses)
            others["ref_weight"] = policy.initial_head.weight
            others["ref_bias"] = policy.initial_head.bias
    others |= teacher_head(policy)
    student, balance = routed_hidden(
        policy.model,
        student_prompts,
        responses,
        compute_dtype=policy.compute_dtype,
        packed=policy.packed,
        balance=policy.router_coef != 0,
    )
    return student, balance, others


def teacher_head(policy: Policy) -> dict[str, Any]:
    """The teacher's own head, where it is not the policy's, as arguments of `fused_hsd_loss`."""
    if policy.teacher_head is None or policy.teacher is policy.model:
        return {}
    bias = policy.teacher_head.bias
    return {
        "teacher_weight": policy.teacher_head.weight.detach(),
        "teacher_bias": None if bias is None else bias.detach(),
    }


def _distilled(policy: Policy, row: TrainingRow) -> Sequence[bool]:
    if policy.teacher is None:
        return [False] * len(row.response)
    return [True] * len(row.response) if row.distilled is None else row.distilled
