from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from hsd.data.mixture import proportional
from hsd.data.questions import Question
from hsd.data.task_configs import ReasoningGymMixtureTask
from hsd.data.tasks import load_task

pytest.importorskip("reasoning_gym")

SIZES = {"train_questions": 40, "validation_questions": 4, "heldout_questions": 8}
WEIGHTS = {"basic_arithmetic": 3.0, "leg_counting": 1.0}


def names(questions: Sequence[Question]) -> Counter[str]:
    return Counter(question.id.partition(":")[0] for question in questions)


def test_each_split_has_the_datasets_by_their_weights() -> None:
    config = ReasoningGymMixtureTask(
        weights=WEIGHTS, options={"basic_arithmetic": {"max_terms": 3}}, **SIZES
    )
    task = load_task(config)
    assert names(task.train) == {"basic_arithmetic": 30, "leg_counting": 10}
    assert names(task.validation) == {"basic_arithmetic": 3, "leg_counting": 1}
    assert names(task.heldout) == {"basic_arithmetic": 6, "leg_counting": 2}
    assert load_task(config).train == task.train
    # Mixed, and not one dataset behind the other.
    assert len(names(task.train[:12])) == 2
    longest = max(sum(f" {sign} " in question.prompt for sign in "+-*/") for question in task.train)
    assert longest <= 3


def test_every_question_is_verified_by_its_own_dataset() -> None:
    task = load_task(ReasoningGymMixtureTask(weights=WEIGHTS, **SIZES))
    verify = pickle.loads(pickle.dumps(task.verify))  # as it goes to the verifiers' processes
    for question in task.train:
        assert verify(question, f"The answer is {question.answer}.")
        assert not verify(question, "The answer is none.")


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 10, [4, 3, 3]),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, 7, [3, 2, 2]),
        ({"a": 1e6, "b": 1.0}, 5, [5, 0]),
        ({"a": 2.0}, 0, [0]),
    ],
)
def test_integers_in_proportion(weights: dict[str, float], total: int, expected: list[int]) -> None:
    assert list(proportional(weights, total).values()) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {}}, r"task\.weights: found none, expected a weight for each dataset"),
        ({"weights": {"a": 0.0}}, r"task\.weights\.a: found 0\.0, expected a number above 0"),
        ({"weights": {"a": float("nan")}}, r"task\.weights\.a: found nan"),
        ({"weights": {"a": 1.0}, "options": {"b": {}}}, r"task\.options: found 'b', which has no"),
        ({"weights": {"a": 1.0}, "options": {"a": {"seed": 1}}}, r"task\.options\.a: found 'seed'"),
        ({"weights": {"a": 1.0}, "train_questions": 0}, r"task\.train_questions: found 0"),
    ],
)
def test_impossible_mixtures_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGymMixtureTask(**fields)


def test_what_a_mixture_cannot_give_is_refused() -> None:
    light = {"basic_arithmetic": 1.0, "leg_counting": 1e-6}
    with pytest.raises(ValueError, match=r"task\.weights\.leg_counting: found 1e-06, which gives"):
        load_task(ReasoningGymMixtureTask(weights=light, **SIZES))
    with pytest.raises(ValueError, match=r"task\.dataset: found 'leg_countin', expected leg_count"):
        load_task(ReasoningGymMixtureTask(weights={"leg_countin": 1.0}, **SIZES))
