"""From groups of rollouts to the rows of the loss: rewards, peers, contexts, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsd.config import ObjectiveConfig
from hsd.data.contexts import ContextBuilder
from hsd.data.peers import divergence_position, uniform_peers
from hsd.data.questions import Question
from hsd.objective.weights import sequence_weights, window_mask
from hsd.policy.packing import TrainingRow
from hsd.rollout.protocol import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Group:
    """A question with its rollouts, decoded and judged."""

    question: Question
    rollouts: Sequence[Rollout]
    texts: Sequence[str]
    rewards: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class JudgedRollout:
    """What became of one rollout on its way into the loss.

    Attributes:
        peer: index of its peer in the group.
        divergence: tau, where it leaves its peer.
        row: None where the objective leaves it out.
    """

    peer: int | None
    divergence: int | None
    peer_truncated_tokens: int
    special_tokens_removed: int
    row: TrainingRow | None


def judge(
    group: Group,
    tokenizer: PreTrainedTokenizerBase,
    contexts: ContextBuilder,
    objective: ObjectiveConfig,
    *,
    seed: int,
    step: int,
    questions: int,
) -> list[JudgedRollout]:
    """Gives each rollout of a group its peer, its teacher's prompt and its token weights.

    Args:
        questions: of the whole step, over all ranks, for the mean.
    """
    prompt = tuple(contexts.student(group.question))
    peers = uniform_peers(group.rewards, seed=seed, step=step, question_id=group.question.id)
    judged = []
    for rollout, correct, peer in zip(group.rollouts, group.rewards, peers, strict=True):
        context = contexts.teacher(
            group.question, peer_text=None if peer is None else group.texts[peer]
        )
        divergence = None
        if peer is not None:
            divergence = divergence_position(rollout.token_ids, group.rollouts[peer].token_ids)
        kept = window_mask(
            len(rollout.token_ids),
            correct=correct,
            divergence=divergence,
            window=objective.window,
        )
        weights = sequence_weights(
            rollout.loss_mask, kept, group_size=len(group.rollouts), questions=questions
        )
        left_out = context is None or (objective.mask == "failures" and correct)
        judged.append(
            JudgedRollout(
                peer=peer,
                divergence=divergence,
                peer_truncated_tokens=context.peer_truncated_tokens if context else 0,
                special_tokens_removed=context.special_tokens_removed if context else 0,
                row=None
                if left_out or context is None
                else TrainingRow(
                    student_prompt=prompt,
                    teacher_prompt=tuple(context.token_ids),
                    response=rollout.token_ids,
                    weights=weights,
                    logprobs=rollout.logprobs,
                ),
            )
        )
    return judged
