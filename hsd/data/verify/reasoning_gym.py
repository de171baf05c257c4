"""The verifier of a reasoning-gym task: the generator's own score_answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from hsd.data.questions import Question
from hsd.data.verify import Verifier
from hsd.data.verify.match import text_after_marker

UNSAFE_SCORERS = frozenset(
    {
        "binary_matrix",
        "coin_flip",
        "composite",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Datasets (0.1.25) whose score_answer may run the answer as Python, by eval or sympy's parse_expr
(composite holds any of them), or compute a fraction with an exponent of any size (coin_flip)."""


class AnswerScorer(Protocol):
    """The one method of a reasoning-gym dataset that a verifier calls."""

    def score_answer(self, answer: str | None, entry: Mapping[str, Any], /) -> float: ...


def score_answer(dataset: AnswerScorer) -> Verifier:
    """A verifier for this dataset's questions: correct if and only if the score reaches 1.

    The answer is what follows the last "answer is" or "answer:" of the response; without either,
    the last lines, as many as the correct answer has. A full stop at the end is dropped unless
    the correct answer has one. An exception in score_answer counts as a wrong answer.
    """
    return partial(_is_correct, dataset)


def _is_correct(dataset: AnswerScorer, question: Question, response: str) -> bool:
    if question.entry is None:
        raise ValueError(f"question {question.id!r}: found no entry, expected reasoning-gym's own")
    try:
        return dataset.score_answer(_final_answer(question, response), question.entry) >= 1.0
    except Exception:  # the scorers parse model text and raise whatever their parser raises
        return False


def _final_answer(question: Question, response: str) -> str:
    answer = text_after_marker(response)
    if answer is None:
        line_count = len(question.answer.strip().splitlines())
        answer = "\n".join(response.strip().splitlines()[-line_count:])
    answer = answer.strip()
    return answer if question.answer.rstrip().endswith(".") else answer.removesuffix(".")
