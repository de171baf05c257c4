"""From groups of rollouts to the rows of the loss: peers, contexts, advantages, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsd.config import Config
from hsd.data.contexts import Context, ContextBuilder
from hsd.data.peers import Peers, divergence_position
from hsd.objective.advantage import ADVANTAGES, shaped_rewards
from hsd.objective.config import ObjectiveConfig
from hsd.objective.normalisation import NORMALISATIONS, StepTotals
from hsd.objective.weights import window_mask
from hsd.policy.packing import TrainingRow
from hsd.rollout.groups import Group


@dataclass(frozen=True, kw_only=True)
class JudgedRollout:
    """What became of one rollout on its way into the loss.

    Attributes:
        peers: whose attempts its teacher is shown.
        peer: index of its first peer, if that is of its own group.
        divergence: tau, where it leaves its first peer; None if that answers another question.
        advantage: of its policy gradient; 0 without one.
        context_length: tokens of its teacher's prompt; None without a teacher.
        row: None where the objective leaves it out.
    """

    peers: Peers
    peer: int | None
    divergence: int | None
    advantage: float
    context_length: int | None
    peer_truncated_tokens: int
    special_tokens_removed: int
    row: TrainingRow | None


def judge(
    group: Group,
    peers: Sequence[Peers],
    contexts: ContextBuilder,
    config: Config,
    totals: StepTotals,
) -> list[JudgedRollout]:
    """Gives each rollout of a group its teacher's prompt, its advantage and its token weights.

    Args:
        peers: of each rollout.
        totals: of the whole update, over all processes, for the mean.
    """
    objective = config.objective
    prompt = tuple(contexts.student(group.question))
    advantages = _advantages(group, config)
    shares = NORMALISATIONS[objective.normalisation](group.own_tokens, totals)
    judged = []
    for index, rollout in enumerate(group.rollouts):
        chosen = peers[index]
        first = chosen.successes[0] if chosen.successes else None
        own = first if first and first.question_id == group.question.id else None
        divergence = divergence_position(rollout.token_ids, own.token_ids) if own else None
        context = _context(group, chosen, contexts, config)
        distilled = _distilled(group, index, divergence, context, objective)
        rewarded = first is None or config.context.fallback != "policy_gradient"
        advantage = advantages[index] if rewarded else 0.0
        row = TrainingRow(
            student_prompt=prompt,
            teacher_prompt=prompt if context is None else tuple(context.token_ids),
            response=rollout.token_ids,
            weights=_weights(rollout.loss_mask, distilled, shares[index], config),
            logprobs=rollout.logprobs,
            advantage=advantage,
            distilled=tuple(distilled) if objective.has_policy_gradient else None,
        )
        judged.append(
            JudgedRollout(
                peers=chosen,
                peer=own.index if own and own.step == group.step else None,
                divergence=divergence,
                advantage=advantage,
                context_length=len(context.token_ids) if context else None,
                peer_truncated_tokens=context.peer_truncated_tokens if context else 0,
                special_tokens_removed=context.special_tokens_removed if context else 0,
                row=row if _has_loss(row, distilled, config) else None,
            )
        )
    return judged


def _advantages(group: Group, config: Config) -> list[float]:
    objective = config.objective
    rewards = shaped_rewards(
        group.rewards,
        [len(rollout.token_ids) for rollout in group.rollouts],
        overlong_tokens=objective.overlong_tokens,
        overlong_penalty=objective.overlong_penalty,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return ADVANTAGES[objective.advantage](rewards)


def _context(
    group: Group, peers: Peers, contexts: ContextBuilder, config: Config
) -> Context | None:
    if config.objective.teacher == "none":
        return None
    return contexts.teacher(
        group.question,
        peers=[peer.text for peer in peers.successes],
        failed=None if peers.failed is None else peers.failed.text,
    )


def _distilled(
    group: Group,
    index: int,
    divergence: int | None,
    context: Context | None,
    objective: ObjectiveConfig,
) -> list[bool]:
    """The tokens of a rollout that have a teacher."""
    length, correct = len(group.rollouts[index].token_ids), group.rewards[index]
    if context is None or (objective.mask == "failures" and correct):
        return [False] * length
    return window_mask(length, correct=correct, divergence=divergence, window=objective.window)


def _weights(
    loss_mask: Sequence[bool], distilled: Sequence[bool], share: float, config: Config
) -> tuple[float, ...]:
    """A token that is not distilled is out altogether, unless a policy gradient reads it."""
    kept = [config.objective.has_policy_gradient or taught for taught in distilled]
    return tuple(
        share if chosen and keep else 0.0 for chosen, keep in zip(loss_mask, kept, strict=True)
    )


def _has_loss(row: TrainingRow, distilled: Sequence[bool], config: Config) -> bool:
    objective = config.objective
    if row.advantage != 0 or any(distilled):
        return True
    referred = objective.has_policy_gradient and objective.ref_coef != 0
    return referred and len(row.response) > 0
