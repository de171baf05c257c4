"""Questions of the package reasoning-gym, an optional dependency."""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

from hsd.data.questions import Question
from hsd.data.verify import Verifier
from hsd.data.verify.reasoning_gym import UNSAFE_SCORERS, score_answer

# Their questions follow the order of sets of strings, which differs from process to process.
_HASH_ORDERED = frozenset({"isomorphic_strings", "knight_swap", "ransom_note", "word_ladder"})


def generate(
    *, dataset: str, options: Mapping[str, int | float | bool | str], seed: int, count: int
) -> tuple[list[Question], Verifier]:
    """Generates distinct questions, and the verifier that belongs to them.

    Args:
        dataset: name of the dataset in reasoning-gym.
        options: passed to reasoning_gym.create_dataset.
        seed: fixes the questions.
        count: how many questions, no two with the same prompt, white space aside.

    Raises:
        ValueError: reasoning-gym is not installed; the dataset is unknown, unsafe or without
            single answers, does not take the options, or has fewer than count distinct questions.
    """
    # Four draws a question and some: enough for generators that repeat themselves, and an end.
    scorer = _Scorer(dataset, dict(options), seed, 4 * count + 64)
    generator = scorer.dataset
    distinct: dict[str, Question] = {}
    for index in range(len(generator)):
        if len(distinct) == count:
            break
        question = _question(generator, dataset, index)
        distinct.setdefault(question.prompt_key, question)
    if len(distinct) < count:
        raise ValueError(
            f"task.train_questions: found {count} questions in the three splits, expected at most "
            f"{len(distinct)}: {dataset} gave no more distinct ones in {len(generator)}"
        )
    return list(distinct.values()), score_answer(scorer)


class _Scorer:
    """A dataset that goes to other processes by its arguments: not all of them pickle."""

    def __init__(
        self, name: str, options: dict[str, int | float | bool | str], seed: int, size: int
    ) -> None:
        self._arguments = (name, options, seed, size)
        self.dataset = _create_dataset(name, options, seed=seed, size=size)

    def score_answer(self, answer: str | None, entry: Mapping[str, Any], /) -> float:
        score: float = self.dataset.score_answer(answer, entry)
        return score

    def __reduce__(self) -> tuple[type[_Scorer], tuple[Any, ...]]:
        return _Scorer, self._arguments


def _create_dataset(
    name: str, options: Mapping[str, int | float | bool | str], *, seed: int, size: int
) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError(
            "task.source: found reasoning_gym, which is not installed, "
            'expected: pip install "hsd-kernels[train]"'
        ) from None
    _check_name(name, sorted(DATASETS))
    # The generators seed question k with seed + k: neighbouring seeds would share their questions.
    spread_seed = random.Random(f"reasoning_gym/{name}/{seed}").randrange(2**31)
    try:
        return reasoning_gym.create_dataset(name, **options, seed=spread_seed, size=size)
    except Exception as error:
        found = f"{dict(options)} ({type(error).__name__}: {error})"
        raise ValueError(f"task.options: found {found}, expected options of {name}") from error


def _check_name(name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names)
        expected = " or ".join(close) if close else f"one of its {len(names)} datasets"
        raise ValueError(f"task.dataset: found {name!r}, expected {expected}")
    if name in UNSAFE_SCORERS:
        raise ValueError(
            f"task.dataset: found {name!r}, whose scorer may run the model's text as code or "
            "without bound, expected another dataset"
        )
    if name in _HASH_ORDERED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ValueError(
            f"task.dataset: found {name!r}, whose questions follow the order of string hashes, "
            "expected PYTHONHASHSEED in the environment, such as PYTHONHASHSEED=0"
        )


def _question(generator: Any, name: str, index: int) -> Question:
    try:
        entry = generator[index]
    except Exception as error:
        found = f"{name}, which failed at question {index} ({type(error).__name__}: {error})"
        raise ValueError(f"task.dataset: found {found}, expected other options") from error
    if not isinstance(entry["answer"], str):
        found = f"{name}, whose questions have no single correct answer"
        raise ValueError(f"task.dataset: found {found}, expected another dataset")
    return Question(
        id=f"{name}:{index}", prompt=entry["question"], answer=entry["answer"], entry=entry
    )
