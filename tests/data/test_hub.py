"""Datasets in Hugging Face's formats, from local directories: no hub is asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hsd.data.questions import Question
from hsd.data.task_configs import HuggingFaceTask
from hsd.data.tasks import load_task

datasets = pytest.importorskip("datasets")

ROWS = [
    {"question": f"What is {n} + {n}?", "worked": f"{n} + {n} = {2 * n}\n#### {2 * n}", "level": n}
    for n in range(30)
]
COLUMNS: dict[str, Any] = {
    "prompt_column": "question",
    "answer_column": "worked",
    "solution_column": "worked",
    "answer_marker": "####",
}


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The rows in two splits, in the format that the test names."""
    path = tmp_path / "data"
    path.mkdir()
    splits = {"train": ROWS[:24], "test": ROWS[24:]}
    if request.param == "saved":
        tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(tables).save_to_disk(path)
        return path
    for name, rows in splits.items():
        if request.param == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        else:
            datasets.Dataset.from_list(rows).to_parquet(path / f"{name}.parquet")
    return path


def one_file(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "rows"
    path.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "train.jsonl").write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("directory", ["saved", "jsonl", "parquet"], indirect=True)
def test_columns_become_prompt_answer_and_solution(directory: Path) -> None:
    config = HuggingFaceTask(dataset=str(directory), heldout_split="test", **COLUMNS)
    task = load_task(config)
    assert task.train[3] == Question(
        id="train:3", prompt="What is 3 + 3?", answer="6", solution="3 + 3 = 6\n#### 6"
    )
    assert [question.id for question in task.heldout] == [f"test:{n}" for n in range(6)]
    assert len(task.train) == 24 and task.validation == () and task.notes == ()
    assert task.verify(task.train[3], "It is 6.")


@pytest.mark.parametrize("directory", ["parquet"], indirect=True)
def test_without_a_held_out_split_some_questions_are_held_out(directory: Path) -> None:
    task = load_task(HuggingFaceTask(dataset=str(directory), heldout_questions=2, **COLUMNS))
    assert len(task.train) == 22 and len(task.heldout) == 2
    assert task.notes == (f"2 questions of {directory} held out, 22 left to train on",)


def test_prompts_of_another_split_are_dropped_from_training(tmp_path: Path) -> None:
    folder = one_file(tmp_path, *({"prompt": f"ask {n}", "answer": n} for n in range(8)))
    test = [{"prompt": " ASK 3", "answer": 3}, {"prompt": "ask 9", "answer": 9}]
    (Path(folder) / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    task = load_task(HuggingFaceTask(dataset=folder, heldout_split="test"))
    assert [question.id for question in task.train] == [f"train:{n}" for n in range(8) if n != 3]
    assert task.notes == ("1 training questions dropped: their prompts are in another split",)


def test_nested_columns_and_chat_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"ask {n}"}], "reward": {"truth": n}}
        for n in range(3)
    ]
    config = HuggingFaceTask(
        dataset=one_file(tmp_path, *rows), answer_column="reward.truth", heldout_questions=0
    )
    assert [(q.prompt, q.answer) for q in load_task(config).train] == [
        ("ask 0", "0"),
        ("ask 1", "1"),
        ("ask 2", "2"),
    ]


@pytest.mark.parametrize(
    ("row", "config", "message"),
    [
        ({"prompt": "a", "answer": None}, {}, r"answer_column: row train:1: found None, expected"),
        ({"prompt": " ", "answer": "1"}, {}, r"prompt_column: row train:1: found ' ', expected"),
        ({"prompt": "a", "answer": "1"}, {"answer_column": "anser"}, r"found 'anser', expected p"),
        ({"prompt": "a", "answer": "1"}, {"answer_marker": "####"}, r"no answer behind it in row"),
        ({"prompt": "a", "answer": "one"}, {}, r"task\.train: found the answer 'one' \(id 'train:"),
    ],
)
def test_a_row_without_a_question_is_refused(
    tmp_path: Path, row: Any, config: Any, message: str
) -> None:
    good = {"prompt": "b", "answer": "#### 1"}
    with pytest.raises(ValueError, match=message) as caught:
        load_task(HuggingFaceTask(dataset=one_file(tmp_path, good, row), **config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("turns", [["user", "user"], ["system"]])
def test_a_prompt_of_other_messages_is_refused(tmp_path: Path, turns: list[str]) -> None:
    messages = [{"role": role, "content": "x"} for role in turns]
    folder = one_file(tmp_path, {"prompt": messages, "answer": "1"})
    with pytest.raises(ValueError, match=r"prompt_column: row train:0: .* expected one of the us"):
        load_task(HuggingFaceTask(dataset=folder))


def test_an_unknown_dataset_or_split_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.dataset: found 'no/such'") as caught:
        load_task(HuggingFaceTask(dataset="no/such"))
    assert "\n" not in str(caught.value)
    folder = one_file(tmp_path, {"prompt": "a", "answer": "1"})
    with pytest.raises(ValueError, match=r"split 'tset'") as caught:
        load_task(HuggingFaceTask(dataset=folder, heldout_split="tset"))
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "hsd-kernels\[datasets\]"'):
        load_task(HuggingFaceTask(dataset="x"))


def test_code_is_no_verifier_of_these() -> None:
    with pytest.raises(ValueError, match=r"task\.verifier: found 'code', expected numeric or"):
        HuggingFaceTask(dataset="x", verifier="code")
