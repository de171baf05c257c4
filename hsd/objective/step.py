"""The gradient of one update: hidden states through the fused loss, and what it saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hsd.distributed.fsdp import (
    gathered_heads,
    head_gradient,
    is_sharded,
    largest_count,
    synchronise_head,
)
from hsd.objective.config import ObjectiveConfig
from hsd.objective.micro_batch import Tokens, hidden_states, response_tokens, teacher_head
from hsd.objective.mismatch import mismatch_factors
from hsd.objective.schedule import value_at
from hsd.objective.token_loss import (
    NEEDS_STATISTICS,
    TOKEN_LOSSES,
    PolicyGradient,
    TokenBatch,
    TokenLossOptions,
    out_of_range,
)
from hsd.policy.packing import TrainingRow, merge_equal, micro_batches, without_idle_ends
from hsd.policy.teachers import Policy
from hsd_kernels import LossOutput, TokenStatistics, fused_hsd_loss

SUMS = (
    "loss",
    "kl",
    "ref_kl",
    "entropy",
    "weight",
    "tokens",
    "gap",
    "teacher_agrees",
    "distilled_weight",
    "distilled_tokens",
    "clipped",
    "router_aux",
    "gradient_mass",
    "dropped_mass",
    "kept_share",
)
"""What `accumulate_gradients` sums: per-token means come from dividing by weights or tokens."""

_IDLE = TrainingRow(
    student_prompt=(0,), teacher_prompt=(0,), response=(0,), weights=(0.0,), logprobs=(0.0,)
)
"""A batch of it goes through the models like any other, and its loss and gradient are zero."""


def accumulate_gradients(
    policy: Policy,
    rows: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    *,
    micro_batch_tokens: int,
    temperature: float,
    step: int = 0,
) -> tuple[Tensor, float]:
    """Adds the gradient of the update's loss to the parameters.

    The weights in `rows` hold every normaliser, so the gradient is the same for any split into
    micro-batches or ranks.

    Args:
        temperature: of sampling. The policy that is sampled is the policy that is trained:
            log-probs, both sides of the KLs and the engine's log-probs are all at it.
        step: where schedules of scalars are read.

    Returns:
        sums in the order of `SUMS`, float64; and the largest gap between the engine's log-probs
        and the policy's, nats.
    """
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    largest_gap = 0.0
    distinct = without_idle_ends(merge_equal(rows))
    batches = micro_batches(distinct, token_budget=micro_batch_tokens, packed=policy.packed)
    if is_sharded(policy.model):
        # Every layer is gathered by all ranks together: none may run one batch less.
        batches += [[_IDLE]] * (largest_count(len(batches)) - len(batches))
    initial = policy.initial if objective.reads_reference(step) else None
    with gathered_heads(policy.model, policy.teacher, initial):
        for position, batch in enumerate(batches, start=1):
            if position == len(batches):
                synchronise_head(policy.model)
            sums, gap = _micro_batch(policy, batch, objective, temperature, step)
            total += sums
            largest_gap = max(largest_gap, gap)
    return total, largest_gap


def _micro_batch(
    policy: Policy,
    batch: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    temperature: float,
    step: int,
) -> tuple[Tensor, float]:
    """Forward and backward; what `_sums` gives."""
    out, tokens, gradient, balance = _forward(policy, batch, objective, temperature, step)
    # A sequence is as heavy in it as in the rest of the loss: no split and no merging changes that.
    shares = torch.tensor([sum(row.weights) for row in batch], device=tokens.weights.device)
    router_aux = shares.new_zeros(()) if balance is None else (shares * balance).sum()
    total = out.loss + policy.router_coef * router_aux
    total.backward()  # type: ignore[no-untyped-call]

    loss = total.detach().double()
    if gradient.constant is not None:
        constant = (tokens.weights * gradient.constant).double().sum()
        loss = loss + value_at(objective.pg_coef, step) * constant
    clipped = gradient.clipped
    if clipped is None:
        ratio = torch.exp(_given(out.stats.logprob) - tokens.engine_logprobs)
        clipped = out_of_range(ratio, tokens.advantages, objective.clip_range)
    return _sums(
        tokens,
        out.stats,
        loss=loss,
        clipped=clipped,
        router_aux=router_aux.detach(),
        vocab_size=len(policy.head.weight),
    )


def _forward(
    policy: Policy,
    batch: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    temperature: float,
    step: int,
) -> tuple[LossOutput, Tokens, PolicyGradient, Tensor | None]:
    """The loss, its tokens and policy gradient; and (B,) load-balancing losses, if any.

    What the loss alone has read dies here: it does not stay through the backward of the layers.
    """
    reference = objective.reads_reference(step)
    student_hidden, balance, others = hidden_states(policy, batch, reference=reference)
    tokens = response_tokens(policy, batch, device=student_hidden.device)
    head = policy.head
    common: dict[str, Any] = {
        "targets": tokens.targets,
        "token_weights": tokens.weights,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
        "temperature": temperature,
        "max_chunk_bytes": objective.max_chunk_bytes,
    }
    log_probs = partial(
        _log_probs, policy, student_hidden.detach(), others["teacher_hidden"], common
    )
    if objective.corrects_mismatch:
        tokens = _corrected(tokens, objective, log_probs()[0])
        common["token_weights"] = tokens.weights
    terms = _divergence_terms(policy, objective, step, tokens.taught)
    if reference:
        terms["ref_coef"] = value_at(objective.ref_coef, step)
    gradient = PolicyGradient(arguments={})
    if objective.has_policy_gradient:
        gradient = _policy_gradient(tokens, objective, step, log_probs)
        terms["pg_coef"] = value_at(objective.pg_coef, step)
    if objective.sparse_tolerance != "none":
        terms["sparse_tolerance"] = objective.sparse_tolerance
    out = fused_hsd_loss(
        student_hidden,  # (N, D)
        weight=head.weight,  # (V, D)
        bias=head.bias,
        weight_grad_out=head_gradient(policy.model),
        **others,
        **common,
        **terms,
        **gradient.arguments,
    )
    return out, tokens, gradient, balance


def _corrected(tokens: Tokens, objective: ObjectiveConfig, logprob: Tensor) -> Tokens:
    """Weights that correct for the mismatch of engine and policy, whose log-probs are given."""
    factors = mismatch_factors(
        logprob - tokens.engine_logprobs,
        tokens.lengths,
        tokens.weights != 0,
        importance_cap=objective.importance_cap,
        sequence_mask=objective.sequence_mask,
    )
    return replace(tokens, weights=tokens.weights * factors)


def _divergence_terms(
    policy: Policy, objective: ObjectiveConfig, step: int, taught: Tensor
) -> dict[str, Any]:
    """The arguments of the divergence from the teacher."""
    if policy.teacher is None:
        return {}
    terms: dict[str, Any] = {
        "divergence": objective.divergence,
        "jsd_beta": objective.jsd_beta,
        "kl_coef": value_at(objective.kl_coef, step),
    }
    if not bool(taught.all()):
        terms["kl_weights"] = taught.float()
    return terms


def _policy_gradient(
    tokens: Tokens,
    objective: ObjectiveConfig,
    step: int,
    log_probs: Callable[[], tuple[Tensor, Tensor | None]],
) -> PolicyGradient:
    """The token loss that the objective names, of the tokens at hand."""
    logprob = teacher_logprob = None
    if objective.token_loss in NEEDS_STATISTICS:
        logprob, teacher_logprob = log_probs()
    batch = TokenBatch(
        lengths=tokens.lengths,
        advantages=tokens.advantages,
        old_logprobs=tokens.engine_logprobs,
        own=tokens.weights != 0,
        distilled=tokens.taught,
        logprob=logprob,
        teacher_logprob=teacher_logprob,
    )
    options = TokenLossOptions(
        clip_range=objective.clip_range,
        teacher_mix=value_at(objective.teacher_mix, step),
        teacher_clip=objective.teacher_clip,
    )
    return TOKEN_LOSSES[objective.token_loss](batch, options)


@torch.no_grad()
def _log_probs(
    policy: Policy, student_hidden: Tensor, teacher_hidden: Tensor | None, common: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probs of the targets under policy and teacher; NaN at tokens without weight."""
    stats = fused_hsd_loss(
        student_hidden,  # (N, D)
        teacher_hidden,  # (N, D)
        policy.head.weight,  # (V, D)
        bias=policy.head.bias,
        advantages=torch.zeros(len(student_hidden), device=student_hidden.device),
        **common,
        **teacher_head(policy),
    ).stats
    return _given(stats.logprob), stats.teacher_logprob


def _sums(
    tokens: Tokens,
    stats: TokenStatistics,
    *,
    loss: Tensor,
    clipped: Tensor,
    router_aux: Tensor,
    vocab_size: int,
) -> tuple[Tensor, float]:
    """The numbers of `SUMS`, and the largest gap between engine and policy, nats."""
    weights, computed = tokens.weights, stats.computed
    ones = torch.ones_like(weights)
    taught = tokens.taught & computed
    gap = (_given(stats.logprob) - tokens.engine_logprobs)[computed].abs()
    sums = torch.stack(
        [
            loss,
            _weighted_sum(weights, stats.kl, taught),
            _weighted_sum(weights, stats.ref_kl, computed),
            _weighted_sum(weights, stats.entropy, computed),
            weights[computed].double().sum(),
            computed.double().sum(),
            gap.double().sum(),
            _weighted_sum(ones, stats.top1_agree, taught),
            weights[taught].double().sum(),
            taught.double().sum(),
            clipped[computed].double().sum(),
            router_aux.double(),
            _weighted_sum(ones, stats.gradient_mass, computed),
            _weighted_sum(ones, stats.dropped_mass, computed),
            _weighted_sum(ones / vocab_size, stats.kept_columns, computed),
        ]
    )
    return sums.cpu(), float(gap.max()) if len(gap) else 0.0


def _weighted_sum(weights: Tensor, values: Tensor | None, chosen: Tensor) -> Tensor:
    """The sum over chosen tokens, float64; 0 for a statistic that was not asked for."""
    if values is None:
        return torch.zeros((), dtype=torch.float64, device=weights.device)
    return (weights[chosen] * values[chosen]).double().sum()


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("the loss left out a statistic whose inputs it was given")
    return value
