"""Mathematical answers by symbolic equality: \\boxed{...}, else the last number.

The comparison is math-verify's (https://github.com/huggingface/Math-Verify), read as LaTeX only:
its reader of plain expressions passes text to Python's eval. Its time limits need SIGALRM in the
main thread and cannot interrupt one long operation, so they are off: sympy may hang, and whoever
calls this does it in a process that can be killed (hsd.data.verify.pool).
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify  # here, so that forks share it

from hsd.data.questions import Question
from hsd.data.verify.match import last_number

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns on every odd answer

_MAX_CHARACTERS = 1000
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THIN_SPACE = re.compile(r"(?<=\d),?\\[,!](?=\d{3}(?!\d))")  # 1\,000 and 1,\!000 are 1000
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_INVISIBLE = re.compile(r"\\[hv]?phantom\s*\{[^{}]*\}")
_SET = re.compile(r"(?:\\left)?\\\{.*,.*\\\}", re.DOTALL)
_ORDERED = re.compile(r"(?:\\left)?[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_PLAIN_NUMBER = re.compile(r"\$?-?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}| ?/ ?[0-9]+)?\.?")


def equivalent(question: Question, response: str) -> bool:
    """Symbolic equality of the response's last \\boxed{...} and the question's answer.

    A response without a box counts by its last number, as the paper does. An answer of more than
    1,000 characters is wrong, and so is one that does not parse.
    """
    gold = last_boxed(question.answer) or question.answer
    found = last_boxed(response)
    if found is None:
        number = last_number(response)
        return number is not None and _equal(gold, f"{number.numerator}/{number.denominator}")
    return _equal(gold, found)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of a text, braces balanced.

    None if there is no box; empty if the last one is not closed, as where a response was cut.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace is no brace
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return ""


def _equal(gold: str, found: str) -> bool:
    if not found or max(len(gold), len(found)) > _MAX_CHARACTERS:
        return False
    gold, found = _plainer(gold), _plainer(found)
    if _is_set(gold) != _is_set(found) and _is_ordered(gold) != _is_ordered(found):
        return False  # {1, 2} is not the point (1, 2), which math-verify takes for it
    if "".join(gold.split()) == "".join(found.split()):
        return True
    if _PLAIN_NUMBER.fullmatch(gold) and _PLAIN_NUMBER.fullmatch(found):
        return last_number(gold) == last_number(found)  # exact, and no need of sympy
    return bool(
        verify(
            _parsed(gold),
            _parsed(found),
            allow_set_relation_comp=True,  # 0 < x < 1 is (0, 1), whichever of them is the answer
            timeout_seconds=None,
        )
    )


def _plainer(text: str) -> str:
    """Without what math-verify does not read: digit groups, repeating decimals, invisible text."""
    text = _THIN_SPACE.sub("", _INVISIBLE.sub("", text))
    text = text.replace(r"\varnothing", r"\emptyset")
    return _REPEATING.sub(_fraction, text)


def _fraction(repeating: re.Match[str]) -> str:
    sign, whole, start, period = repeating.groups()
    value = Fraction(int(whole + start + period or 0) - int(whole + start or 0))
    value /= 10 ** len(start) * (10 ** len(period) - 1)
    return rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}"


def _is_set(text: str) -> bool:
    return _SET.fullmatch(text) is not None


def _is_ordered(text: str) -> bool:
    return _ORDERED.fullmatch(text) is not None


def _parsed(text: str) -> Any:
    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=None,
    )
