"""The numbers of a training step, over all ranks."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence

import torch

from hsd.config import Config
from hsd.data.verify import Outcome
from hsd.distributed.process import World
from hsd.objective.batch import JudgedRollout
from hsd.objective.schedule import value_at
from hsd.objective.step import SUMS
from hsd.rollout.groups import Group, too_old
from hsd.scores import repetition

_OUTCOMES = {outcome: f"verifier_{outcome.value}" for outcome in Outcome}


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
    counted = _summed(world, _counts(config, groups, judged))
    total = _summed(world, dict(zip(SUMS, sums.tolist(), strict=True)))
    gap, memory = _largest(world, [largest_gap, peak_memory()])
    count, kept = counted["rollouts"], max(counted["kept"], 1)
    weight, trained = max(total["weight"], 1e-30), max(total["tokens"], 1.0)
    old = {} if config.rollout.max_policy_age is None else {"too_old_rollouts": counted["old"]}
    return {
        "reward": counted["correct"] / count,
        "loss": total["loss"],
        **_teacher_metrics(config, total, step),
        **_reference_metrics(config, total, step),
        "entropy": total["entropy"] / weight,
        "weight": total["weight"],
        "kept_share": counted["kept"] / count,
        "peer_share": counted["with_peer"] / kept,
        "failed_with_peer_share": counted["failed_with_peer"] / kept,
        "response_length": counted["tokens"] / count,
        "cut_share": counted["cut"] / count,
        "context_length": counted["context_tokens"] / max(counted["contexts"], 1),
        "repetition": counted["repeated"] / count,
        "peers_truncated": counted["peers_truncated"],
        "peer_truncated_tokens": counted["peer_truncated_tokens"],
        "special_tokens_removed": counted["special_tokens_removed"],
        "generated_tokens": counted["tokens"],
        "trained_tokens": total["tokens"],
        "engine_gap_mean": total["gap"] / trained,
        "engine_gap_max": gap,
        "peak_memory_bytes": memory,
        **_gradient_metrics(config, total),
        **_sparse_metrics(config, total),
        **old,
        **({"router_aux_loss": total["router_aux"] / weight} if total["router_aux"] else {}),
        **{name: counted[name] for name in _OUTCOMES.values()},
    }


def _counts(
    config: Config,
    groups: Sequence[Group],
    judged: Sequence[tuple[Group, Sequence[JudgedRollout]]],
) -> dict[str, float]:
    """What this process has of each."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verified = [outcome for group in groups for outcome in group.outcomes]
    outcomes = [outcome for _, each in judged for outcome in each]
    failed = [
        outcome
        for group, each in judged
        for outcome, reward in zip(each, group.rewards, strict=True)
        if not reward
    ]
    return {
        "rollouts": len(rollouts),
        "correct": sum(reward for group in groups for reward in group.rewards),
        "tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "cut": sum(rollout.finish_reason == "length" for rollout in rollouts),
        "repeated": sum(repetition(rollout.token_ids) for rollout in rollouts),
        "old": sum(len(group.rollouts) for group in groups if too_old(group, config)),
        **{name: verified.count(outcome) for outcome, name in _OUTCOMES.items()},
        "kept": len(outcomes),
        "with_peer": sum(bool(outcome.peers.successes) for outcome in outcomes),
        "failed_with_peer": sum(bool(outcome.peers.successes) for outcome in failed),
        "peers_truncated": sum(outcome.peer_truncated_tokens > 0 for outcome in outcomes),
        "peer_truncated_tokens": sum(outcome.peer_truncated_tokens for outcome in outcomes),
        "special_tokens_removed": sum(outcome.special_tokens_removed for outcome in outcomes),
        "contexts": sum(outcome.context_length is not None for outcome in outcomes),
        "context_tokens": sum(outcome.context_length or 0 for outcome in outcomes),
    }


def _summed(world: World, values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes."""
    found = world.sum_(torch.tensor(list(values.values()), dtype=torch.float64))
    return dict(zip(values, found.tolist(), strict=True))


def _largest(world: World, values: Sequence[float]) -> list[float]:
    """The largest of each over all processes."""
    of_ranks = torch.zeros((len(values), world.size), dtype=torch.float64)
    of_ranks[:, world.rank] = torch.tensor(values, dtype=torch.float64)
    found: list[float] = world.sum_(of_ranks).amax(1).tolist()
    return found


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
