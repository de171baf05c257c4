"""Successful peers of a group of rollouts, and where a rollout departs from its peer."""

from __future__ import annotations

import random
from collections.abc import Sequence


def uniform_peers(
    rewards: Sequence[bool], *, seed: int, step: int, question_id: str
) -> list[int | None]:
    """For each rollout i of a group a peer j != i, uniform over those with rewards[j] true.

    The draw of rollout i has a random stream of its own, from (seed, step, question_id, i).
    Source: arXiv 2606.15576, one fresh draw per rollout.

    Args:
        rewards: success of each rollout of the group.
        seed: the run's seed.
        step: the training step, from 0.
        question_id: the question that the group answers.

    Returns:
        one index per rollout, None where no other rollout succeeded.
    """
    successes = [j for j, reward in enumerate(rewards) if reward]
    peers: list[int | None] = []
    for i in range(len(rewards)):
        candidates = [j for j in successes if j != i]
        rng = random.Random(f"peer/{seed}/{step}/{i}/{question_id}")
        peers.append(rng.choice(candidates) if candidates else None)
    return peers


def divergence_position(rollout_ids: Sequence[int], peer_ids: Sequence[int]) -> int:
    """tau: the first index, from 0, where the token ids differ.

    If one is a prefix of the other, the length of the shorter.
    """
    for position, (rollout_id, peer_id) in enumerate(zip(rollout_ids, peer_ids, strict=False)):
        if rollout_id != peer_id:
            return position
    return min(len(rollout_ids), len(peer_ids))


def expected_coverage(pass_rate: float, group_size: int) -> float:
    """The expected share of rollouts that fail and have a successful peer.

    f(p, G) = (1 - p) (1 - (1 - p)^(G - 1)), largest at p = 1 - G^(-1 / (G - 1)).

    Args:
        pass_rate: p, from 0 to 1.
        group_size: G, rollouts per question, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0.0 <= pass_rate <= 1.0:
        raise ValueError(f"pass_rate: found {pass_rate}, expected a number from 0 to 1")
    if group_size < 1:
        raise ValueError(f"group_size: found {group_size}, expected at least 1")
    failure_rate = 1.0 - pass_rate
    return failure_rate * (1.0 - failure_rate ** (group_size - 1))
