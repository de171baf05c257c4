"""Questions with verifiable answers, and the JSONL files that hold them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REQUIRED = ("prompt", "answer")
_OPTIONAL = ("solution", "id")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task.

    Args:
        id: name of the question, unique in its split; seeds the draw of its peers.
        prompt: what the policy is asked.
        answer: the correct final answer, as text.
        solution: a worked solution, where the source has one.
        entry: the generator's own record, which reasoning-gym's score_answer asks for.
    """

    id: str
    prompt: str
    answer: str
    solution: str | None = None
    entry: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def prompt_key(self) -> str:
        """The prompt with every run of white space as one space: equal keys, same question."""
        return " ".join(self.prompt.split())


class _NumberText(str):
    """A JSON number as it was written: 3.50 stays "3.50", and 1e400 does not become infinity."""


def load_jsonl(path: Path) -> list[Question]:
    """Reads questions from a UTF-8 file with one JSON object a line; blank lines are skipped.

    Args:
        path: each object has prompt (string) and answer (string or number), and may have solution
            and id (strings; the default id is "<stem of path>:<line number>").

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object, an id occurs twice, or there is no question; the
            message names the path and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a JSONL file of questions")
    questions: list[Question] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        question = _question(_parse(line, where), default_id=f"{path.stem}:{number}", where=where)
        if question.id in line_of_id:
            first = line_of_id[question.id]
            raise ValueError(
                f"{where}: found id {question.id!r} of line {first}, expected a new id"
            )
        line_of_id[question.id] = number
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: found no question, expected at least one line")
    return questions


def require_solutions(questions: Sequence[Question], *, option: str) -> None:
    """Checks that every question has a worked solution, which `option` is to show.

    Raises:
        ValueError: one has none; names the option and the question.
    """
    missing = next((question.id for question in questions if question.solution is None), None)
    if missing is not None:
        raise ValueError(f"{option}: question {missing!r} has no solution, expected one in each")


def question_stream(questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """Questions in a shuffled order, epoch after epoch."""
    epoch = 0
    while True:
        order = list(questions)
        random.Random(f"questions/{seed}/{epoch}").shuffle(order)
        yield from order
        epoch += 1


def _parse(line: bytes, where: str) -> dict[str, object]:
    try:
        record = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_object_without_repeats,
            parse_int=_NumberText,
            parse_float=_NumberText,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: found bytes that are not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: found no valid JSON ({error}), expected one object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {_kind(record)}, expected a JSON object")
    return record


def _question(record: dict[str, object], *, default_id: str, where: str) -> Question:
    unknown = [key for key in record if key not in _REQUIRED + _OPTIONAL]
    if unknown:
        known = ", ".join(_REQUIRED + _OPTIONAL)
        raise ValueError(f"{where}: found unknown key {unknown[0]!r}, expected only {known}")
    for key in _REQUIRED:
        if key not in record:
            raise ValueError(f"{where}: found no {key!r}, expected prompt and answer")
    return Question(
        id=_text(record.get("id", default_id), key="id", where=where),
        prompt=_text(record["prompt"], key="prompt", where=where),
        answer=_text(record["answer"], key="answer", where=where, number_allowed=True),
        solution=(
            _text(record["solution"], key="solution", where=where) if "solution" in record else None
        ),
    )


def _text(value: object, *, key: str, where: str, number_allowed: bool = False) -> str:
    expected = "a string or a number" if number_allowed else "a string"
    if not isinstance(value, str) or (isinstance(value, _NumberText) and not number_allowed):
        raise ValueError(f"{where}: {key}: found {_kind(value)}, expected {expected}")
    if not value.strip():
        raise ValueError(f"{where}: {key}: found only white space, expected {expected}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"a lone surrogate at character {error.start}"
        raise ValueError(f"{where}: {key}: found {found}, expected valid Unicode") from None
    return str(value)


def _kind(value: object) -> str:
    if isinstance(value, _NumberText):
        return f"the number {value[:40]}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null")


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")
