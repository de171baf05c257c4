"""Every completion of an evaluation, question by question, in memory or in a JSONL file.

The file makes an evaluation resumable: a question is a line, written whole once it is judged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsd.metrics import JsonLines, read_json_lines


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample.

    Attributes:
        tokens: its length.
        outcome: correct, wrong, or what kept the verifier from a verdict.
        final_answer: what it votes for in the majority.
        repetition: share of 4-grams of tokens that occurred before.
    """

    text: str
    tokens: int
    finish_reason: str
    outcome: str
    final_answer: str
    repetition: float


class Completions:
    """The completions of one evaluation, by question.

    Args:
        path: a file to keep them in; None for memory alone. A file that is there is continued;
            what an interrupt left of its last line is cut off.
        settings: all that the samples depend on, recorded in the first line.

    Raises:
        ValueError: the file holds another evaluation, or is none.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self._done: dict[str, list[Completion]] = {}
        self._file: JsonLines | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_broken_end(path)
        records = read_json_lines(path) if path.exists() else []
        expected = {"settings": json.loads(json.dumps(settings))}
        if records and records[0] != expected:
            raise ValueError(f"{path}: found another evaluation, expected one of equal settings")
        for number, record in enumerate(records[1:], start=2):
            try:
                completions = [Completion(**each) for each in record["completions"]]
                self._done[record["question"]] = completions
            except (KeyError, TypeError):
                raise ValueError(f"{path}:{number}: found no completions, expected some") from None
        self._file = JsonLines(path)
        if not records:
            self._file.write(expected)

    def __contains__(self, question_id: str) -> bool:
        return question_id in self._done

    def __getitem__(self, question_id: str) -> list[Completion]:
        return self._done[question_id]

    def add(self, question_id: str, completions: Sequence[Completion], **described: str) -> None:
        """Keeps the samples of a question; `described` goes into the file beside them."""
        self._done[question_id] = list(completions)
        if self._file is not None:
            each = [asdict(completion) for completion in completions]
            self._file.write({"question": question_id, **described, "completions": each})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def settings_key(settings: Mapping[str, Any]) -> str:
    """A name for settings: equal for equal ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _cut_broken_end(path: Path) -> None:
    """Removes what stands behind the last line break: an interrupt left it."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
