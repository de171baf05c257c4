"""Accuracy of a policy on questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from hsd.completions import Completion, Completions
from hsd.data.contexts import ContextBuilder
from hsd.data.questions import Question
from hsd.data.verify import Judge, Outcome
from hsd.distributed.process import World
from hsd.rollout.protocol import Rollout, RolloutEngine, Sampling, response_text, stream_seed
from hsd.scores import Evaluation, final_answer, majority_correct, repetition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: ContextBuilder,
    questions: Sequence[Question],
    judge: Judge,
    *,
    sampling: Sampling,
    samples: int,
    seed: int,
    world: World,
    shown: int = 0,
    completions: Completions | None = None,
    questions_per_round: int | None = None,
) -> Evaluation:
    """Samples n responses to each question and verifies them; ranks share the questions.

    Args:
        completions: keeps them; questions that it holds already are not sampled again.
        questions_per_round: questions that are sampled before they are kept; None for all.
    """
    own = world.share(questions)
    done = Completions() if completions is None else completions
    missing = [question for question in own if question.id not in done]
    size = questions_per_round or max(1, len(missing))
    # One round at least: an engine that ranks share is asked by all of them.
    for start in range(0, max(1, len(missing)), size):
        chosen = missing[start : start + size]
        groups = engine.generate(
            [prompts.student(question) for question in chosen],
            seeds=[stream_seed("evaluation", seed, question.id) for question in chosen],
            group_size=samples,
            sampling=sampling,
        )
        texts = [[response_text(tokenizer, rollout) for rollout in group] for group in groups]
        outcomes = iter(
            judge([(q, text) for q, its in zip(chosen, texts, strict=True) for text in its])
        )
        for question, group, own_texts in zip(chosen, groups, texts, strict=True):
            judged = [
                _completion(text, next(outcomes), rollout)
                for text, rollout in zip(own_texts, group, strict=True)
            ]
            done.add(question.id, judged, prompt=question.prompt, answer=question.answer)
    return _evaluation(questions, own, done, samples=samples, world=world, shown=shown)


def _completion(text: str, outcome: Outcome, rollout: Rollout) -> Completion:
    return Completion(
        text=text,
        tokens=len(rollout.token_ids),
        finish_reason=rollout.finish_reason,
        outcome=outcome.value,
        final_answer=final_answer(text),
        repetition=repetition(rollout.token_ids),
    )


def _evaluation(
    questions: Sequence[Question],
    own: Sequence[Question],
    done: Completions,
    *,
    samples: int,
    world: World,
    shown: int,
) -> Evaluation:
    """The numbers of all ranks from the completions of each."""
    table = torch.zeros((5, len(questions), samples), dtype=torch.float64)
    majority = torch.zeros(len(questions))
    for position, question in enumerate(own):
        row, group = world.rank + position * world.size, done[question.id]
        correct = [each.outcome == "correct" for each in group]
        majority[row] = float(majority_correct([each.final_answer for each in group], correct))
        columns = [
            (
                float(verdict),
                float(each.tokens),
                float(each.finish_reason == "length"),
                float(each.outcome not in ("correct", "wrong")),
                each.repetition,
            )
            for each, verdict in zip(group, correct, strict=True)
        ]
        table[:, row] = torch.tensor(columns, dtype=torch.float64).T
    correct_, lengths, truncated, errors, repeated = world.sum_(table)
    first = [(question, done[question.id][0]) for question in own[:shown]]
    return Evaluation(
        correct=correct_.bool(),
        majority=world.sum_(majority).bool(),
        lengths=lengths,
        truncated=truncated.bool(),
        errors=errors.bool(),
        repetition=repeated,
        samples=[
            (question.prompt, question.answer, each.text, each.outcome == "correct")
            for question, each in first
        ],
    )


def accuracy_table(rows: Sequence[tuple[str, Evaluation]], *, title: str) -> Table:
    """avg@n, pass@n and majority with their 95 % intervals, a line each."""
    samples = rows[0][1].correct.shape[1]
    table = Table(title=title, title_justify="left")
    for column in ("", f"avg@{samples}", f"pass@{samples}", f"majority@{samples}", "questions"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, result in rows:
        table.add_row(
            name,
            f"{result.average:.3f} ± {result.average_interval:.3f}",
            "{:.3f} ± {:.3f}".format(*result.pass_at(samples)),
            "{:.3f} ± {:.3f}".format(*result.majority_accuracy),
            str(len(result.correct)),
        )
    return table
