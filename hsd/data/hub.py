"""Questions from datasets in Hugging Face's formats, local or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hsd.data.questions import Question
from hsd.data.task_configs import HuggingFaceTask


def load_split(config: HuggingFaceTask, split: str) -> list[Question]:
    """The questions of one split, named "<split>:<row>".

    Raises:
        ValueError: the package datasets is not installed, there is no such dataset, split or
            column, or a row holds no question; names the row, counted from 0.
    """
    rows = _rows(config, split)
    questions = [_question(row, config, f"{split}:{n}") for n, row in enumerate(rows)]
    if not questions:
        raise ValueError(f"task.dataset: found no row in split {split!r}, expected some")
    return questions


def _rows(config: HuggingFaceTask, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "task.source: found huggingface, which needs datasets, "
            'expected: pip install "hsd-kernels[datasets]"'
        ) from None
    found = f"{config.dataset!r} with split {split!r}"
    try:
        if (Path(config.dataset) / "dataset_dict.json").is_file():
            dataset: Any = datasets.load_from_disk(config.dataset)[split]
        else:
            # Versions from 4 on run no code of a dataset.
            dataset = datasets.load_dataset(
                config.dataset, config.subset, split=split, revision=config.revision
            )
    except Exception as error:  # of many kinds, among them the network's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"task.dataset: found {found} ({reason}), expected a dataset of the hub or a "
            "directory of one, and a split of it"
        ) from None
    columns = {
        name: column
        for name in ("prompt_column", "answer_column", "solution_column")
        if (column := getattr(config, name)) is not None
    }
    for name, column in columns.items():
        if _top(column, dataset.column_names) not in dataset.column_names:
            expected = " or ".join(dataset.column_names)
            raise ValueError(f"task.{name}: found {column!r}, expected {expected}")
    tops = {_top(column, dataset.column_names) for column in columns.values()}
    rows: Iterable[Mapping[str, Any]] = dataset.select_columns(sorted(tops))
    return rows


def _top(column: str, names: Iterable[str]) -> str:
    return column if column in names else column.partition(".")[0]


def _value(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for key in [column] if column in row else column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _question(row: Mapping[str, Any], config: HuggingFaceTask, name: str) -> Question:
    prompt = _value(row, config.prompt_column)
    if isinstance(prompt, list):
        prompt = _only_user_turn(prompt, f"task.prompt_column: row {name}")
    answer = _value(row, config.answer_column)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    answer = _text(answer, f"task.answer_column: row {name}", "a text or a number")
    if config.answer_marker is not None:
        _, marker, after = answer.rpartition(config.answer_marker)
        if not marker or not after.strip():
            found = f"no answer behind it in row {name}"
            raise ValueError(f"task.answer_marker: {config.answer_marker!r}: found {found}")
        answer = after.strip()
    solution = None
    if config.solution_column is not None:
        solution = _value(row, config.solution_column)
        solution = _text(solution, f"task.solution_column: row {name}", "a text")
    prompt = _text(
        prompt, f"task.prompt_column: row {name}", "a text or a list of one user message"
    )
    return Question(id=name, prompt=prompt, answer=answer, solution=solution)


def _only_user_turn(messages: list[Any], where: str) -> Any:
    if len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise ValueError(f"{where}: found {len(messages)} messages, expected one of the user")
    if messages[0].get("role") != "user":
        found = f"a message of {messages[0].get('role')!r}"
        raise ValueError(f"{where}: found {found}, expected one of the user")
    return messages[0].get("content")


def _text(value: Any, where: str, expected: str) -> str:
    if not isinstance(value, str) or not value.strip():
        found = repr(value)[:80]
        raise ValueError(f"{where}: found {found}, expected {expected}")
    return value
