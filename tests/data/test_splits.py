import json
from pathlib import Path

import pytest

from hsd.data.questions import Question
from hsd.data.splits import drop_measured, hold_out
from hsd.data.task_configs import JsonlTask
from hsd.data.tasks import Task, load_task


def ask(*prompts: str) -> list[Question]:
    return [Question(id=str(n), prompt=prompt, answer="1") for n, prompt in enumerate(prompts)]


def hashes(questions: object) -> set[bytes]:
    return {question.prompt_hash for question in questions}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is  2 + 2?\n", "what is 2 + 2?", True),
        ("Caf\u00e9", "Cafe\u0301", True),
        ("STRASSE", "straße", True),
        ("2²", "22", False),
        ("2 + 2", "2 - 2", False),
        ("ab", "a b", False),
    ],
)
def test_the_normal_form_of_a_prompt(one: str, other: str, same: bool) -> None:
    first, second = ask(one, other)
    assert (first.prompt_hash == second.prompt_hash) is same


@pytest.mark.parametrize(
    ("size", "count", "held"), [(100, 5, 5), (100, 64, 10), (5, 64, 1), (2, 64, 1), (1, 64, 0)]
)
def test_how_many_are_held_out(size: int, count: int, held: int) -> None:
    questions = ask(*(f"question {n}" for n in range(size)))
    train, heldout = hold_out(questions, count)
    assert len(heldout) == held and len(train) == size - held
    assert not hashes(train) & hashes(heldout)


def test_the_order_of_the_questions_does_not_matter_and_copies_are_not_trained_on() -> None:
    questions = ask(*(f"question {n}" for n in range(40)))
    _, heldout = hold_out(questions, 4)
    copies = ask(*(f" QUESTION  {n}" for n in range(40)))
    train, again = hold_out([*reversed(questions), *copies], 4)
    assert hashes(again) == hashes(heldout)
    assert not hashes(train) & hashes(again)
    assert len(train) == 2 * 36


def test_training_questions_that_are_measured_are_dropped_and_counted() -> None:
    train = ask("a", "b", "B ", "c", "d")
    kept, dropped = drop_measured(train, ask("b"), ask("C", "x"))
    assert [question.prompt for question in kept] == ["a", "d"]
    assert dropped == 3


@pytest.mark.parametrize("split", ["validation", "heldout"])
def test_no_task_trains_on_what_it_measures(split: str) -> None:
    splits = {"train": ask("a", "b"), "validation": [], "heldout": [], split: ask("c", "B")}
    parts = {name: tuple(questions) for name, questions in splits.items()}
    with pytest.raises(ValueError, match=rf"task\.{split}: found the prompt 'B' of task\.train"):
        Task(**parts, verify=lambda question, response: True)  # type: ignore[arg-type]


def test_a_single_file_gives_held_out_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "answer": n + 1}) for n in range(50)]
    path.write_text("\n".join(lines), encoding="utf-8")
    task = load_task(JsonlTask(train=path))
    assert len(task.heldout) == 5 and len(task.train) == 45
    assert task.notes == (f"5 questions of {path} held out, 45 left to train on",)
    path.write_text("\n".join(reversed(lines)), encoding="utf-8")
    assert hashes(load_task(JsonlTask(train=path)).heldout) == hashes(task.heldout)
    assert load_task(JsonlTask(train=path, heldout_questions=0)).heldout == ()
