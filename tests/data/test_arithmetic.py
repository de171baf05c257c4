import re

import pytest

from hsd.data.arithmetic import generate, space_size


@pytest.mark.parametrize("kind", ["sum", "multiply_add", "difference_sum"])
def test_prompts_solutions_and_answers_agree(kind: str) -> None:
    for question in generate(kind=kind, terms=4, digits=2, seed=1, count=100):
        match = re.fullmatch(r"Compute ([0-9 x+-]+)\.", question.prompt)
        assert match
        value = eval(match[1].replace("x", "*"))  # our own text
        assert question.answer == str(value)
        assert question.solution.endswith(f" = {value}.")
        steps = question.solution.removesuffix(".").split(", ")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left.replace("x", "*")) == int(right)
        assert len(steps) == (4 if kind == "multiply_add" else 3)
        assert ("-" in match[1]) == (kind == "difference_sum")


def test_the_published_wording() -> None:
    question = generate(kind="sum", terms=3, digits=2, seed=0, count=1)[0]
    a, b, c = map(int, re.findall(r"\d+", question.prompt))
    assert question.prompt == f"Compute {a} + {b} + {c}."
    assert question.solution == (f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}.")


def test_same_seed_same_questions_and_a_longer_draw_extends_a_shorter() -> None:
    knobs = {"kind": "sum", "terms": 3, "digits": 2}
    first = generate(**knobs, seed=5, count=50)
    assert [q.prompt for q in first[:2]] == ["Compute 30 + 77 + 83.", "Compute 25 + 35 + 91."]
    assert generate(**knobs, seed=5, count=80)[:50] == first
    assert generate(**knobs, seed=6, count=50) != first


@pytest.mark.parametrize(
    ("kind", "size"), [("sum", 81), ("multiply_add", 81 * 8), ("difference_sum", 81)]
)
def test_the_whole_space_is_reached_once_and_no_more(kind: str, size: int) -> None:
    knobs = {"kind": kind, "terms": 2, "digits": 1}
    assert space_size(**knobs) == size
    questions = generate(**knobs, seed=0, count=size)
    assert len({question.prompt for question in questions}) == size
    assert len({question.id for question in questions}) == size
    with pytest.raises(ValueError, match=f"found {size + 1}, expected at most {size}"):
        generate(**knobs, seed=0, count=size + 1)


def test_numbers_have_the_digits_asked_for() -> None:
    for question in generate(kind="sum", terms=6, digits=18, seed=0, count=20):
        assert all(len(number) == 18 for number in re.findall(r"\d+", question.prompt))
