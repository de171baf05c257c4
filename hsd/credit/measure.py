"""From groups of rollouts to the credit of every token, in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hsd.config import Config
from hsd.credit.contexts import CreditContexts, OtherSuccesses
from hsd.credit.model import CreditModel, StudentView
from hsd.credit.records import ContextCredit, RolloutCredit
from hsd.credit.source import CreditGroup
from hsd.credit.tokens import token_texts
from hsd.data.peers import divergence_position
from hsd.objective.normalisation import NORMALISATIONS, StepTotals
from hsd.objective.weights import window_mask

ROLLOUTS_AT_A_TIME = 32


def measure(
    groups: Iterable[CreditGroup],
    others: OtherSuccesses,
    credit_model: CreditModel,
    contexts: CreditContexts,
    config: Config,
) -> Iterator[RolloutCredit]:
    """The credit of groups of rollouts, in their order; a few dozen rollouts are held at a time.

    Args:
        others: successes of other questions, of the same groups.
        config: of the run; gives the tokens' weights in its loss. Where they depend on all tokens
            of the step ("token_global"), its groups count as being as long as the one at hand.
    """
    tasks: list[_Task] = []
    for group in groups:
        other = others.for_question(group.question.id)
        others.add(group)
        prompt = contexts.student(group.question)
        for index in range(len(group.token_ids)):
            teacher_prompts = contexts.teacher(group, index, other=other)
            weights = _weights(group, index, config)
            tasks.append(
                _Task(
                    group=group,
                    index=index,
                    student_prompt=prompt,
                    teacher_prompts=teacher_prompts,
                    weights=weights,
                )
            )
        if len(tasks) >= ROLLOUTS_AT_A_TIME:
            yield from _measure_tasks(credit_model, tasks)
            tasks = []
    yield from _measure_tasks(credit_model, tasks)


@dataclass(frozen=True, kw_only=True)
class _Task:
    group: CreditGroup
    index: int
    student_prompt: list[int]
    teacher_prompts: dict[str, list[int]]
    weights: tuple[float, ...]

    @property
    def response(self) -> tuple[int, ...]:
        return self.group.token_ids[self.index]

    @property
    def padded_length(self) -> int:
        prompts = [self.student_prompt, *self.teacher_prompts.values()]
        return max(map(len, prompts)) + len(self.response)


def _divergence(group: CreditGroup, index: int) -> int | None:
    peer = group.peers[index]
    if peer is None:
        return None
    return divergence_position(group.token_ids[index], group.token_ids[peer])


def _weights(group: CreditGroup, index: int, config: Config) -> tuple[float, ...]:
    """The weights of the tokens in the divergence of the run."""
    correct, objective = group.rewards[index], config.objective
    length = len(group.token_ids[index])
    kept = window_mask(
        length,
        correct=correct,
        divergence=_divergence(group, index),
        window=objective.window,
    )
    if objective.mask == "failures" and correct:
        kept = [False] * length
    own_tokens = [sum(mask) for mask in group.loss_masks]
    questions = config.rollout.questions_per_step
    totals = StepTotals(
        questions=questions,
        tokens=sum(own_tokens) * questions,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    share = NORMALISATIONS[objective.normalisation](own_tokens, totals)[index]
    own = zip(group.loss_masks[index], kept, strict=True)
    return tuple(share if mask and keep else 0.0 for mask, keep in own)


def _measure_tasks(credit_model: CreditModel, tasks: Sequence[_Task]) -> list[RolloutCredit]:
    """In the order of `tasks`; batches are of similar length."""
    order = sorted(range(len(tasks)), key=lambda i: tasks[i].padded_length)
    batches: list[list[int]] = []
    for i in order:
        # Sorted by length: the rollout at hand is the longest of its batch.
        fits = batches and (len(batches[-1]) + 1) * tasks[i].padded_length
        if fits and fits <= credit_model.micro_batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    results: dict[int, RolloutCredit] = {}
    for batch in batches:
        measured = _measure_batch(credit_model, [tasks[i] for i in batch])
        results |= dict(zip(batch, measured, strict=True))
    return [results[i] for i in range(len(tasks))]


@torch.no_grad()
def _measure_batch(credit_model: CreditModel, tasks: Sequence[_Task]) -> list[RolloutCredit]:
    responses = [task.response for task in tasks]
    prompts = [task.student_prompt for task in tasks]
    hidden = credit_model.hidden(prompts, responses)
    student = credit_model.student(hidden, responses)
    by_context: list[dict[str, ContextCredit]] = [{} for _ in tasks]
    for name in dict.fromkeys(name for task in tasks for name in task.teacher_prompts):
        chosen = [i for i, task in enumerate(tasks) if name in task.teacher_prompts]
        found = credit_model.teacher(
            [hidden[i] for i in chosen],
            [tasks[i].teacher_prompts[name] for i in chosen],
            [responses[i] for i in chosen],
        )
        for i, credit in zip(chosen, found, strict=True):
            by_context[i][name] = credit
    return [
        _record(credit_model, task, view, contexts)
        for task, view, contexts in zip(tasks, student, by_context, strict=True)
    ]


def _record(
    credit_model: CreditModel,
    task: _Task,
    student: StudentView,
    contexts: dict[str, ContextCredit],
) -> RolloutCredit:
    group, index = task.group, task.index
    parts = [student.logprob, student.entropy]
    parts += [part for c in contexts.values() for part in (c.logprob, c.kl, c.entropy)]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(
            f"model: found a log-prob, KL or entropy that is not finite on rollout {index} of "
            f"question {group.question.id!r:.60}, expected finite ones"
        )
    return RolloutCredit(
        step=group.step,
        question=group.question.id,
        prompt=group.question.prompt,
        answer=group.question.answer or None,
        index=index,
        group_size=len(group.rewards),
        group_correct=sum(group.rewards),
        correct=group.rewards[index],
        finish_reason=group.finish_reasons[index],
        peer=group.peers[index],
        divergence=_divergence(group, index),
        text=group.texts[index],
        token_ids=np.array(task.response, dtype=np.int64),
        tokens=token_texts(credit_model.tokenizer, task.response),
        logprob=student.logprob,
        entropy=student.entropy,
        weight=np.array(task.weights, dtype=np.float64),
        top=student.top,
        contexts=contexts,
    )
