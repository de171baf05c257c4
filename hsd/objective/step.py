"""The gradient of one step: hidden states of both sides through the fused loss, and what it saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hsd.config import ObjectiveConfig
from hsd.policy.head import OutputHead, response_hidden
from hsd.policy.packing import TrainingRow, merge_equal, micro_batches, without_idle_ends
from hsd_kernels import fused_hsd_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the loss needs of the models."""

    model: PreTrainedModel
    head: OutputHead
    teacher: PreTrainedModel  # the live model itself, or the initial one
    teacher_head: OutputHead
    initial: PreTrainedModel  # frozen
    initial_head: OutputHead
    compute_dtype: torch.dtype


SUMS = ("loss", "kl", "ref_kl", "entropy", "weight", "tokens", "gap", "teacher_agrees")
"""What `accumulate_gradients` sums: per-token means come from dividing by weight or tokens."""


def accumulate_gradients(
    policy: Policy,
    rows: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    *,
    micro_batch_tokens: int,
    temperature: float,
) -> tuple[torch.Tensor, float]:
    """Adds the gradient of the step's loss to the parameters.

    The weights in `rows` hold every normaliser, so the gradient is the same for any split into
    micro-batches or ranks.

    Args:
        temperature: of sampling. The policy that is sampled is the policy that is trained:
            log-probs, both sides of the KLs and the engine's log-probs are all at it.

    Returns:
        sums in the order of `SUMS`, float64; and the largest gap between the engine's log-probs
        and the policy's, nats.
    """
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    largest_gap = 0.0
    distinct = without_idle_ends(merge_equal(rows))
    for batch in micro_batches(distinct, token_budget=micro_batch_tokens):
        sums, gap = _micro_batch(policy, batch, objective, temperature)
        total += sums
        largest_gap = max(largest_gap, gap)
    return total, largest_gap


def _micro_batch(
    policy: Policy, batch: Sequence[TrainingRow], objective: ObjectiveConfig, temperature: float
) -> tuple[torch.Tensor, float]:
    responses = [row.response for row in batch]
    student_prompts = [row.student_prompt for row in batch]
    dtype = policy.compute_dtype
    with torch.no_grad():
        teacher_hidden = response_hidden(
            policy.teacher, [row.teacher_prompt for row in batch], responses, compute_dtype=dtype
        )
        initial_hidden = response_hidden(
            policy.initial, student_prompts, responses, compute_dtype=dtype
        )
    student_hidden = response_hidden(policy.model, student_prompts, responses, compute_dtype=dtype)
    weights = torch.tensor([weight for row in batch for weight in row.weights])
    head, own_teacher = policy.head, policy.teacher is not policy.model
    out = fused_hsd_loss(
        student_hidden,  # (N, D)
        teacher_hidden,  # (N, D)
        head.weight,  # (V, D)
        bias=head.bias,
        teacher_weight=policy.teacher_head.weight.detach() if own_teacher else None,
        teacher_bias=_detached(policy.teacher_head.bias) if own_teacher else None,
        ref_hidden=initial_hidden,  # (N, D)
        ref_weight=policy.initial_head.weight,
        ref_bias=policy.initial_head.bias,
        ref_coef=objective.ref_coef,
        targets=torch.tensor([token for response in responses for token in response]),
        token_weights=weights,
        divergence=objective.divergence,
        jsd_beta=objective.jsd_beta,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        temperature=temperature,
        max_chunk_bytes=objective.max_chunk_bytes,
    )
    out.loss.backward()  # type: ignore[no-untyped-call]

    stats = out.stats
    computed = stats.computed
    engine = torch.tensor([value for row in batch for value in row.logprobs])
    gap = (_given(stats.logprob) - engine)[computed].abs()
    weighted = weights[computed]
    sums = torch.stack(
        [
            out.loss.detach().double(),
            (weighted * _given(stats.kl)[computed]).double().sum(),
            (weighted * _given(stats.ref_kl)[computed]).double().sum(),
            (weighted * stats.entropy[computed]).double().sum(),
            weighted.double().sum(),
            computed.double().sum(),
            gap.double().sum(),
            _given(stats.top1_agree)[computed].double().sum(),
        ]
    )
    return sums, float(gap.max()) if len(gap) else 0.0


def _detached(bias: torch.nn.Parameter | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise RuntimeError("the loss left out a statistic whose inputs it was given")
    return value
