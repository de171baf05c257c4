"""The groups of a step: sampled, judged, and filtered until the step is full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.peers import Attempt, PeerPolicy, Peers
from hsd.data.questions import Question
from hsd.data.verify import Judge, Outcome
from hsd.distributed.process import World
from hsd.objective.group_filter import GROUP_FILTERS
from hsd.objective.normalisation import StepTotals
from hsd.rollout.protocol import Rollout, RolloutEngine, Sampling, response_text, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Group:
    """A question with its rollouts, decoded and judged.

    Attributes:
        step: the training step that sampled it, from 0.
        place: among the groups that the step keeps, over all processes; -1 if it is not kept.
    """

    question: Question
    rollouts: Sequence[Rollout]
    texts: Sequence[str]
    outcomes: Sequence[Outcome]
    step: int = 0
    place: int = 0

    @property
    def rewards(self) -> list[bool]:
        """Whether each rollout is correct; one that could not be judged is not."""
        return [outcome is Outcome.CORRECT for outcome in self.outcomes]

    @property
    def own_tokens(self) -> list[int]:
        """Tokens of each rollout that the policy chose."""
        return [sum(rollout.loss_mask) for rollout in self.rollouts]

    @property
    def attempts(self) -> list[Attempt]:
        """The rollouts as peer policies see them."""
        return [
            Attempt(
                question_id=self.question.id,
                step=self.step,
                index=index,
                text=text,
                token_ids=rollout.token_ids,
                logprobs=rollout.logprobs,
                correct=correct,
            )
            for index, (rollout, text, correct) in enumerate(
                zip(self.rollouts, self.texts, self.rewards, strict=True)
            )
        ]


@dataclass(frozen=True, kw_only=True)
class GroupSampler:
    """What turns questions into judged groups."""

    config: Config
    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    contexts: ContextBuilder
    judge: Judge
    sampling: Sampling
    world: World

    def sample(self, stream: Iterator[Question], step: int) -> list[Group]:
        """This process's share of the groups of a step, those that are not kept too.

        Rounds of sampling go on until as many groups as the step asks for pass the filter, or
        rollout.sampling_rounds are done (dynamic sampling; DAPO, arXiv 2503.14476). Which
        questions a round draws does not depend on the number of processes.
        """
        passes = GROUP_FILTERS[self.config.objective.group_filter]
        wanted, kept = self.config.rollout.questions_per_step, 0
        groups: list[Group] = []
        for _ in range(self.config.rollout.sampling_rounds):
            questions = [next(stream) for _ in range(wanted - kept)]
            sampled = self._judged(self.world.share(questions), step)
            flags = torch.zeros(len(questions), dtype=torch.int64)
            flags[self.world.rank :: self.world.size] = torch.tensor(
                [passes(group.rewards) and not too_old(group, self.config) for group in sampled],
                dtype=torch.int64,
            )
            places = self.world.sum_(flags).cumsum(0) + kept - 1
            for position, group in enumerate(sampled):
                own = self.world.rank + position * self.world.size
                groups.append(replace(group, place=int(places[own]) if flags[own] else -1))
            kept += int(flags.sum())
            if kept == wanted:
                break
        return groups

    def _judged(self, questions: Sequence[Question], step: int) -> list[Group]:
        sampled = self.engine.generate(
            [self.contexts.student(question) for question in questions],
            seeds=[stream_seed("rollout", self.config.seed, step, q.id) for q in questions],
            group_size=self.config.rollout.group_size,
            sampling=self.sampling,
        )
        texts = [[response_text(self.tokenizer, one) for one in group] for group in sampled]
        outcomes = iter(
            self.judge([(q, text) for q, own in zip(questions, texts, strict=True) for text in own])
        )
        return [
            Group(
                question=question,
                rollouts=group,
                texts=own,
                outcomes=[next(outcomes) for _ in own],
                step=step,
            )
            for question, group, own in zip(questions, sampled, texts, strict=True)
        ]


def too_old(group: Group, config: Config) -> bool:
    """Whether weights sampled a rollout that are more than rollout.max_policy_age updates behind.

    An engine counts its weights by steps. The group goes as a whole: its advantages and peers are
    between rollouts of one policy.
    """
    oldest = min(rollout.policy_version for rollout in group.rollouts)
    limit = config.rollout.max_policy_age
    return limit is not None and (group.step - oldest) * config.optimizer.updates_per_step > limit


def step_totals(groups: Sequence[Group], config: Config, world: World) -> StepTotals:
    """What the mean of an update over these groups of every process is over."""
    counts = torch.tensor([len(groups), sum(sum(group.own_tokens) for group in groups)])
    questions, tokens = world.sum_(counts).tolist()
    return StepTotals(
        questions=questions, tokens=tokens, max_new_tokens=config.rollout.max_new_tokens
    )


def choose_peers(policy: PeerPolicy, groups: Sequence[Group], world: World) -> list[list[Peers]]:
    """The peers of each rollout of this process's groups."""
    attempts = [group.attempts for group in groups]
    others: list[Attempt] = []
    if policy.needs_other_groups:
        # A peer may come from any group of the step, whichever process sampled it.
        places = [group.place for group in groups]
        shared = world.gather(list(zip(places, attempts, strict=True)))
        others = [one for _, group in sorted(shared, key=lambda pair: pair[0]) for one in group]
    return [policy.choose(group, others) for group in attempts]
