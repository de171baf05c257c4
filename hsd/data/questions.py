"""Questions with verifiable answers, and the JSONL files that hold them."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REQUIRED = ("prompt", "answer")
_OPTIONAL = ("solution", "id")
_UNIT_TESTS = ("tests", "functions", "prelude", "cases")


@dataclass(frozen=True, kw_only=True)
class UnitTests:
    """What a program must pass: tests of its functions, or cases of standard input.

    Args:
        tests: Python source that calls the functions; check(candidate), if it defines that, is
            called with the first one.
        functions: their names.
        prelude: Python source that both the program and the tests begin with.
        cases: (standard input, expected standard output) pairs.
    """

    tests: str = ""
    functions: tuple[str, ...] = ()
    prelude: str = ""
    cases: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task.

    Args:
        id: name of the question, unique in its split; seeds the draw of its peers.
        prompt: what the policy is asked.
        answer: the correct final answer, as text; empty where there is none, as for code.
        solution: a worked solution, where the source has one.
        entry: the generator's own record, which reasoning-gym's score_answer asks for.
        unit_tests: what code is verified by.
    """

    id: str
    prompt: str
    answer: str
    solution: str | None = None
    entry: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    unit_tests: UnitTests | None = field(default=None, repr=False)

    @property
    def prompt_key(self) -> str:
        """The prompt's normal form: NFC, case folded, every run of white space one space.

        Equal keys, same question. Not NFKC, which makes 22 of 2².
        """
        return " ".join(unicodedata.normalize("NFC", self.prompt).casefold().split())

    @property
    def prompt_hash(self) -> bytes:
        """16 bytes of the normal form's SHA-256."""
        return hashlib.sha256(self.prompt_key.encode("utf-8", "replace")).digest()[:16]


class _NumberText(str):
    """A JSON number as it was written: 3.50 stays "3.50", and 1e400 does not become infinity."""


def load_jsonl(path: Path) -> list[Question]:
    """Reads questions from a UTF-8 file with one JSON object a line; blank lines are skipped.

    Args:
        path: each object has prompt (string) and answer (string or number), and may have solution
            and id (strings; the default id is "<stem of path>:<line number>"). For code it has
            tests (string) and functions (list of names), or cases (list of [input, output]), may
            have prelude (string), and needs no answer; see UnitTests.

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
    unknown = [key for key in record if key not in _REQUIRED + _OPTIONAL + _UNIT_TESTS]
    if unknown:
        known = ", ".join(_REQUIRED + _OPTIONAL + _UNIT_TESTS)
        raise ValueError(f"{where}: found unknown key {unknown[0]!r}, expected only {known}")
    unit_tests = _unit_tests(record, where)
    for key in _REQUIRED if unit_tests is None else ("prompt",):
        if key not in record:
            raise ValueError(f"{where}: found no {key!r}, expected prompt and answer")
    return Question(
        id=_text(record.get("id", default_id), key="id", where=where),
        prompt=_text(record["prompt"], key="prompt", where=where),
        answer=(
            _text(record["answer"], key="answer", where=where, number_allowed=True)
            if "answer" in record
            else ""
        ),
        solution=(
            _text(record["solution"], key="solution", where=where) if "solution" in record else None
        ),
        unit_tests=unit_tests,
    )


def _unit_tests(record: dict[str, object], where: str) -> UnitTests | None:
    if not any(key in record for key in _UNIT_TESTS):
        return None
    if ("tests" in record) == ("cases" in record) or ("tests" in record) != ("functions" in record):
        found = ", ".join(key for key in _UNIT_TESTS if key in record)
        raise ValueError(f"{where}: found {found}, expected tests with functions, or cases")
    prelude = _text(record["prelude"], key="prelude", where=where) if "prelude" in record else ""
    if "cases" in record:
        return UnitTests(prelude=prelude, cases=_cases(record["cases"], where))
    functions = record["functions"]
    if not isinstance(functions, list) or not functions:
        raise ValueError(f"{where}: functions: found {_kind(functions)}, expected a list of names")
    names = tuple(_text(name, key="functions", where=where) for name in functions)
    tests = _text(record["tests"], key="tests", where=where)
    return UnitTests(prelude=prelude, tests=tests, functions=names)


def _cases(value: object, where: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in value if isinstance(value, list) else ():
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"{where}: cases: found {pair!r}, expected [input, output], strings")
        pairs.append((pair[0], pair[1]))
    if not pairs:
        found = _kind(value)
        raise ValueError(f"{where}: cases: found {found}, expected a list of [input, output]")
    return tuple(pairs)


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
