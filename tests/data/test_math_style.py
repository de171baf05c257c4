"""The shipped problems in the style of MATH are right, and their verifier finds them so."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsd.data.questions import Question
from hsd.data.tasks import load_task
from hsd.data.verify.math_answer import equivalent, last_boxed
from hsd.overlap import overlap
from hsd.recipe import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def questions() -> dict[str, tuple[Question, ...]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load_task(load_recipe(Path("recipes/math_style.toml")).task).splits


def test_every_solution_gives_the_answer_and_no_other(
    questions: dict[str, tuple[Question, ...]],
) -> None:
    every = [*questions["train"], *questions["heldout"]]
    assert len(every) == 48
    for question, other in zip(every, [*every[1:], every[0]], strict=True):
        assert last_boxed(question.solution or "") == question.answer
        assert equivalent(question, question.solution or "")
        same = question.answer == other.answer
        assert equivalent(question, other.solution or "") is same, (question.id, other.id)


def test_held_out_problems_are_no_copies(questions: dict[str, tuple[Question, ...]]) -> None:
    found = overlap(questions["train"], questions["heldout"])
    assert found.questions == 24 and not found.shared


@pytest.mark.parametrize(
    ("start", "response"),
    [
        ("Write the repeating decimal", r"So $x = \boxed{\dfrac{36}{99}}$."),
        ("Simplify $\\sqrt{72}", r"\boxed{\sqrt{242}}"),
        ("A geometric sequence begins", r"\boxed{20.25}"),
        ("Expand $(x + 2)", r"\boxed{-10 + x^2 - 3x}"),
    ],
)
def test_other_ways_to_write_an_answer(
    questions: dict[str, tuple[Question, ...]], start: str, response: str
) -> None:
    every = [*questions["train"], *questions["heldout"]]
    (question,) = [each for each in every if each.prompt.startswith(start)]
    assert equivalent(question, response)
