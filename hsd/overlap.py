"""Text that held-out questions share with training questions: `hsd overlap RECIPE`.

Two questions overlap where 13 words in a row are the same (13-grams, as GPT-3's contamination study
counts them, arXiv 2005.14165, appendix C). Equal prompts never get this far: no task has one in two
splits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hsd.data.questions import Question
from hsd.data.tasks import load_task
from hsd.recipe import fail, parse_arguments

NGRAM = 13  # words
COMMON = 10
"""13-grams of more training questions than these are taken for the wording of an instruction."""

_WORD = re.compile(r"\w+")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What a split shares with the training questions.

    Attributes:
        questions: in the split.
        short: of them, those of fewer than 13 words, which cannot overlap.
        shared: (question, training question, the first words in common) of each that overlaps.
        instructions: questions that have only common 13-grams in common with training questions.
    """

    questions: int
    short: int
    shared: Sequence[tuple[Question, Question, str]]
    instructions: int


def overlap(train: Sequence[Question], measured: Sequence[Question]) -> Overlap:
    """Compares the words of prompts, case and punctuation aside; memory grows with the words."""
    grams = [_grams(question.prompt) for question in measured]
    wanted = {gram for own in grams for gram in own}
    count: Counter[tuple[str, ...]] = Counter()
    first: dict[tuple[str, ...], Question] = {}
    for question in train:
        for gram in wanted.intersection(_grams(question.prompt)):
            count[gram] += 1
            first.setdefault(gram, question)
    shared, instructions = [], 0
    for question, own in zip(measured, grams, strict=True):
        found = [gram for gram in own if gram in count]
        rare = next((gram for gram in found if count[gram] <= COMMON), None)
        if rare is not None:
            shared.append((question, first[rare], " ".join(rare)))
        elif found:
            instructions += 1
    return Overlap(
        questions=len(measured),
        short=sum(not own for own in grams),
        shared=shared,
        instructions=instructions,
    )


def _grams(text: str) -> list[tuple[str, ...]]:
    """The 13-grams of a text, in its order; punctuation is no word."""
    words = _WORD.findall(text.casefold())
    return list(zip(*(words[start:] for start in range(NGRAM)), strict=False))


def main(argv: list[str]) -> int:
    """`hsd overlap RECIPE ...`; returns the exit code."""
    config = parse_arguments(argv, prog="hsd overlap")
    try:
        task = load_task(config.task)
    except (ValueError, OSError) as error:
        fail(str(error))
    console = Console()
    for note in task.notes:
        console.print(note, markup=False, soft_wrap=True)
    table = Table(title=f"{NGRAM}-grams in common with the training questions")
    for column in ("split", "questions", "overlap", "instruction only", f"under {NGRAM} words"):
        table.add_column(column, justify="left" if column == "split" else "right")
    table.add_row("train", str(len(task.train)), "", "", "")
    found = {name: overlap(task.train, task.splits[name]) for name in ("validation", "heldout")}
    for name, each in found.items():
        if each.questions:
            share = f"{len(each.shared)} ({len(each.shared) / each.questions:.1%})"
            numbers = (each.questions, share, each.instructions, each.short)
            table.add_row(name, *map(str, numbers))
    console.print(table)
    for each in found.values():
        for question, other, words in each.shared[:_SHOWN]:
            line = f"{question.id} and {other.id} of train: {words}"
            console.print(Text(line), soft_wrap=True)
    return 0
