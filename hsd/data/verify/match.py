"""Verifiers by comparison of the final answer: as text, and as a number."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from hsd.data.questions import Question

_MARKER = re.compile(r"answer\s*(?:is\b\s*:?|:)", re.IGNORECASE)

# An exponent has at most three digits and a number at most _MAX_CHARACTERS, so that no text makes
# the comparison slow; a sign counts only where it does not follow an operand, as in 10-3.
_MAX_CHARACTERS = 1000
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-+])?\$?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})(?![0-9])"
    r"| ?/ ?(?P<denominator>[0-9]+)(?![.,]?[0-9]))?"
)


def text_after_marker(text: str) -> str | None:
    """What follows the last "answer is" or "answer:", in any case; None if there is neither."""
    markers = list(_MARKER.finditer(text))
    return text[markers[-1].end() :] if markers else None


def exact(question: Question, response: str) -> bool:
    """Text equality, but for case, white space and full stops at the end.

    The response counts from its last "answer is" or "answer:" on, or as a whole if it has neither.
    """
    found = text_after_marker(response)
    return _folded(response if found is None else found) == _folded(question.answer)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(". ")


def numeric(question: Question, response: str) -> bool:
    """Equality of the last number in the response and the last number in the answer."""
    found = last_number(response)
    return found is not None and found == last_number(question.answer)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly, or None if there is none.

    Reads 1,234 and -5 and 3.50 and 2e3 and 3/4; a full stop behind is no part of the number. A
    number of more than 1,000 characters and a zero denominator count as no number.
    """
    numbers = list(_NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    if not numbers or len(numbers[-1].group()) > _MAX_CHARACTERS:
        return None
    last = numbers[-1]
    number = last["number"].replace(",", "")
    value = Fraction(Decimal(f"{last['sign'] or ''}{number}e{last['exponent'] or 0}"))
    denominator = int(last["denominator"] or 1)
    return value / denominator if denominator else None
