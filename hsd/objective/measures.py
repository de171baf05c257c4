"""The numbers of a training step, over all ranks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence

import torch

from hsd.config import Config
from hsd.distributed.process import World
from hsd.objective.batch import JudgedRollout
from hsd.objective.schedule import value_at
from hsd.objective.step import SUMS
from hsd.rollout.groups import Group, too_old
from hsd.scores import repetition


def step_metrics(
    world: World,
    config: Config,
    groups: Sequence[Group],
    judged: Sequence[tuple[Group, Sequence[JudgedRollout]]],
    sums: torch.Tensor,
    largest_gap: float,
    *,
    step: int,
) -> dict[str, float]:
    """The step's numbers over all ranks.

    Args:
        groups: all that were sampled; rewards and lengths are of these.
        judged: those that the step kept; all else is of these.
        sums: of `accumulate_gradients`, over the updates of the step.
    """
    outcomes = [outcome for _, each in judged for outcome in each]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failed = [
        outcome
        for group, each in judged
        for outcome, reward in zip(each, group.rewards, strict=True)
        if not reward
    ]
    counts = torch.tensor(
        [
            len(rollouts),
            sum(reward for group in groups for reward in group.rewards),
            len(outcomes),
            sum(bool(outcome.peers.successes) for outcome in outcomes),
            sum(bool(outcome.peers.successes) for outcome in failed),
            sum(len(rollout.token_ids) for rollout in rollouts),
            sum(rollout.finish_reason == "length" for rollout in rollouts),
            sum(outcome.peer_truncated_tokens > 0 for outcome in outcomes),
            sum(outcome.peer_truncated_tokens for outcome in outcomes),
            sum(outcome.special_tokens_removed for outcome in outcomes),
            sum(outcome.context_length is not None for outcome in outcomes),
            sum(outcome.context_length or 0 for outcome in outcomes),
            sum(repetition(rollout.token_ids) for rollout in rollouts),
            sum(len(group.rollouts) for group in groups if too_old(group, config)),
        ],
        dtype=torch.float64,
    )
    world.sum_(counts)
    largest = torch.zeros((2, world.size), dtype=torch.float64)
    largest[:, world.rank] = torch.tensor([largest_gap, peak_memory()], dtype=torch.float64)
    gap, memory = world.sum_(largest).amax(1).tolist()
    total = dict(zip(SUMS, world.sum_(sums).tolist(), strict=True))
    count, correct, kept, with_peer, covered, tokens, cut, *contexts, repeated, old = (
        counts.tolist()
    )
    truncated, truncated_tokens, removed, taught, context_tokens = contexts
    weight, trained = max(total["weight"], 1e-30), max(total["tokens"], 1.0)
    return {
        "reward": correct / count,
        "loss": total["loss"],
        **_teacher_metrics(config, total, step),
        **_reference_metrics(config, total, step),
        "entropy": total["entropy"] / weight,
        "weight": total["weight"],
        "kept_share": kept / count,
        "peer_share": with_peer / max(kept, 1),
        "failed_with_peer_share": covered / max(kept, 1),
        "response_length": tokens / count,
        "cut_share": cut / count,
        "context_length": context_tokens / max(taught, 1),
        "repetition": repeated / count,
        "peers_truncated": truncated,
        "peer_truncated_tokens": truncated_tokens,
        "special_tokens_removed": removed,
        "generated_tokens": tokens,
        "trained_tokens": total["tokens"],
        "engine_gap_mean": total["gap"] / trained,
        "engine_gap_max": gap,
        "peak_memory_bytes": memory,
        **_gradient_metrics(config, total),
        **_sparse_metrics(config, total),
        **({} if config.rollout.max_policy_age is None else {"too_old_rollouts": old}),
        **({"router_aux_loss": total["router_aux"] / weight} if total["router_aux"] else {}),
    }


def peak_memory() -> int:
    """The largest resident size of this process so far, bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size  # Linux counts in KiB


def _gradient_metrics(config: Config, total: dict[str, float]) -> dict[str, float]:
    if not config.objective.has_policy_gradient:
        return {}
    return {"clip_share": total["clipped"] / max(total["tokens"], 1.0)}


def _sparse_metrics(config: Config, total: dict[str, float]) -> dict[str, float]:
    if config.objective.sparse_tolerance == "none":
        return {}
    return {
        "columns_kept": total["kept_share"] / max(total["tokens"], 1.0),
        "mass_dropped": total["dropped_mass"] / max(total["gradient_mass"], 1e-30),
    }


def _reference_metrics(config: Config, total: dict[str, float], step: int) -> dict[str, float]:
    if not config.objective.reads_reference(step):
        return {}
    return {"ref_kl": total["ref_kl"] / max(total["weight"], 1e-30)}


def _teacher_metrics(config: Config, total: dict[str, float], step: int) -> dict[str, float]:
    """What there is to say of a teacher, if there is one."""
    objective = config.objective
    if objective.teacher == "none":
        return {}
    pull = value_at(objective.kl_coef, step) * total["kl"]
    return {
        "kl": total["kl"] / max(total["distilled_weight"], 1e-30),
        "ref_share": value_at(objective.ref_coef, step) * total["ref_kl"] / max(pull, 1e-30),
        "top1_agree": total["teacher_agrees"] / max(total["distilled_tokens"], 1.0),
    }
