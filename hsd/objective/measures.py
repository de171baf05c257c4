"""The numbers of a training step, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hsd.config import Config
from hsd.distributed.process import World
from hsd.objective.batch import Group, JudgedRollout
from hsd.objective.step import SUMS


def step_metrics(
    world: World,
    config: Config,
    groups: Sequence[Group],
    judged: Sequence[Sequence[JudgedRollout]],
    sums: torch.Tensor,
    largest_gap: float,
) -> dict[str, float]:
    """The step's numbers over all ranks."""
    outcomes = [outcome for each in judged for outcome in each]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    failed = [o for o, reward in zip(outcomes, rewards, strict=True) if not reward]
    counts = torch.tensor(
        [
            len(rollouts),
            sum(rewards),
            sum(outcome.peer is not None for outcome in outcomes),
            sum(outcome.peer is not None for outcome in failed),
            sum(len(rollout.token_ids) for rollout in rollouts),
            sum(rollout.finish_reason == "length" for rollout in rollouts),
            sum(outcome.peer_truncated_tokens > 0 for outcome in outcomes),
            sum(outcome.special_tokens_removed for outcome in outcomes),
        ],
        dtype=torch.float64,
    )
    world.sum_(counts)
    gaps = torch.zeros(world.size, dtype=torch.float64)
    gaps[world.rank] = largest_gap
    world.sum_(gaps)
    total = dict(zip(SUMS, world.sum_(sums).tolist(), strict=True))
    count, correct, with_peer, covered, tokens, cut, truncated, removed = counts.tolist()
    weight, trained = max(total["weight"], 1e-30), max(total["tokens"], 1.0)
    return {
        "reward": correct / count,
        "loss": total["loss"],
        "kl": total["kl"] / weight,
        "ref_kl": total["ref_kl"] / weight,
        "ref_share": config.objective.ref_coef * total["ref_kl"] / max(total["kl"], 1e-30),
        "entropy": total["entropy"] / weight,
        "weight": total["weight"],
        "top1_agree": total["teacher_agrees"] / trained,
        "peer_share": with_peer / count,
        "failed_with_peer_share": covered / count,
        "response_length": tokens / count,
        "cut_share": cut / count,
        "peers_truncated": truncated,
        "special_tokens_removed": removed,
        "generated_tokens": tokens,
        "trained_tokens": total["tokens"],
        "engine_gap_mean": total["gap"] / trained,
        "engine_gap_max": float(gaps.max()),
    }
