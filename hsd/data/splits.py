"""Held-out questions are never trained on: prompts are compared by a hash of their normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hsd.data.questions import Question


def cut(
    questions: Sequence[Question], *, heldout: int, validation: int
) -> dict[str, tuple[Question, ...]]:
    """Generated questions in three splits.

    Training questions come last, so that a longer training split leaves the others as they are.
    """
    end = heldout + validation
    return {
        "train": tuple(questions[end:]),
        "validation": tuple(questions[heldout:end]),
        "heldout": tuple(questions[:heldout]),
    }


def hold_out(
    questions: Sequence[Question], count: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Splits questions into those to train on and those that are held out.

    The prompts with the lowest hashes are held out, so neither a seed nor the order of the
    questions matters, and other copies of a held-out prompt go with it.

    Args:
        count: of held-out prompts; at most a tenth of all, but one if there are two.
    """
    first: dict[bytes, Question] = {}
    for question in questions:
        first.setdefault(question.prompt_hash, question)
    count = min(count, max(1, len(first) // 10), len(first) - 1)
    chosen = frozenset(sorted(first)[:count])
    heldout = tuple(first[key] for key in first if key in chosen)
    return tuple(q for q in questions if q.prompt_hash not in chosen), heldout


def drop_measured(
    train: Sequence[Question], *measured: Sequence[Question]
) -> tuple[tuple[Question, ...], int]:
    """The training questions whose prompts are in none of the other splits, and how many are."""
    seen = {question.prompt_hash for split in measured for question in split}
    kept = tuple(question for question in train if question.prompt_hash not in seen)
    return kept, len(train) - len(kept)


def require_disjoint(splits: Mapping[str, Sequence[Question]]) -> None:
    """Checks that no prompt is in two splits.

    Raises:
        ValueError: one is; names both splits and the prompt.
    """
    split_of_prompt: dict[bytes, str] = {}
    for name, questions in splits.items():
        for question in questions:
            other = split_of_prompt.setdefault(question.prompt_hash, name)
            if other != name:
                raise ValueError(
                    f"task.{name}: found the prompt {question.prompt[:80]!r} of task.{other}, "
                    "expected splits without a common prompt"
                )
