import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest

from hsd.data.questions import Question
from hsd.data.verify import VERIFIERS
from hsd.data.verify.match import exact, last_number, numeric
from hsd.data.verify.reasoning_gym import UNSAFE_SCORERS, score_answer


def question(answer: str, **more: Any) -> Question:
    return Question(id="q", prompt="p", answer=answer, **more)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", Fraction(1234)),
        ("so it is -5", Fraction(-5)),
        ("so it is \u22125", Fraction(-5)),
        ("+7 degrees", Fraction(7)),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("10-3", Fraction(3)),
        ("(10)-3", Fraction(3)),
        ("10 - 3 = 7.", Fraction(7)),
        ("costs -$1,000.25!", Fraction(-100025, 100)),
        ("\\boxed{168}", Fraction(168)),
        ("#### 18", Fraction(18)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4.", Fraction(-3, 4)),
        ("5/0", None),
        ("2e3", Fraction(2000)),
        ("2E-1", Fraction(1, 5)),
        ("first 3, then 4", Fraction(4)),
        ("1,23", Fraction(23)),
        ("0001", Fraction(1)),
        ("no number, nan, inf", None),
        ("", None),
        ("9" * 1000, Fraction(10**1000 - 1)),
        ("9" * 1001, None),
    ],
)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("3.5", "The answer is 3.50.", True),
        ("168", "132 + 36 = 168. The answer is 168.", True),
        ("168", "132 + 36 = 168. The answer is 169.", False),
        ("168", "The answer is nan", False),
        ("168", "", False),
        ("-5", "5", False),
        ("1234", "1,234.", True),
    ],
)
def test_numeric(answer: str, response: str, correct: bool) -> None:
    assert VERIFIERS["numeric"](question(answer), response) is correct


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "1e" * 300_000,
        "1," * 300_000,
        "1/" * 300_000,
        "1e999",
        "1," + "111," * 250_000,
    ],
)
def test_numeric_is_quick_on_hostile_text(text: str) -> None:
    started = time.perf_counter()
    assert numeric(question("3"), text) is False
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("Paris", "paris", True),
        ("Paris", "I think so. The answer is  PARIS.\n", True),
        ("Paris", "The answer is London. No, Answer: Paris", True),
        ("Paris", "Paris it is not: the answer is London", False),
        ("Paris", "The answer is: Paris", True),
        ("New York", "new \n york", True),
        ("Paris", "I say Paris", False),
        ("Paris", "The answer isn't Paris", False),
        ("Paris", "", False),
        ("U.S.", "the answer is U.S.", True),
    ],
)
def test_exact(answer: str, response: str, correct: bool) -> None:
    assert exact(question(answer), response) is correct


class Scorer:
    """Scores 1 for the entry's answer, .9 for a prefix; fails on the text "crash"."""

    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        if answer == "crash":
            raise RuntimeError("parser failed")
        assert answer is not None
        return 1.0 if answer == entry["answer"] else 0.9


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("12", "some steps\n12", True),
        ("12", "some steps\n12.\n", True),
        ("12", "12\nmore", False),
        ("12", "The answer is 12.", True),
        ("12", "Answer: 12", True),
        ("12", "1", False),
        ("12", "crash", False),
        ("12", "", False),
        ("He sat.", "The answer is He sat.", True),
        ("1 2\n3 4", "Let us see.\n1 2\n3 4\n", True),
        ("1 2\n3 4", "The answer is:\n1 2\n3 4", True),
    ],
)
def test_reasoning_gym_answers(answer: str, response: str, correct: bool) -> None:
    verify = score_answer(Scorer())
    assert verify(question(answer, entry={"answer": answer}), response) is correct


def test_reasoning_gym_needs_the_generators_record() -> None:
    with pytest.raises(ValueError, match="question 'q': found no entry"):
        score_answer(Scorer())(question("1"), "1")


def test_every_scorer_that_evaluates_model_text_is_refused() -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    import inspect

    evaluating = {
        name
        for name, (dataset, _) in factory.DATASETS.items()
        if any(
            call in inspect.getsource(dataset.score_answer)
            for call in ("eval(answer", "parse_expr(answer", "sympify(answer", "Fraction(answer")
        )
    }
    assert len(evaluating) >= 5
    assert evaluating <= UNSAFE_SCORERS
