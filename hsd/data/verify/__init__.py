"""Verifiers: was a response correct? hsd.data.tasks chooses one by name.

A verifier is a plain function of trusted code. It sees model text, which is untrusted: it never
runs it outside hsd.data.sandbox. It may hang or raise: it is called by hsd.data.verify.pool, in a
process that can be killed, and what it does there becomes one of four outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TypeAlias

from hsd.data.questions import Question
from hsd.data.verify import match


class Outcome(str, Enum):
    """What became of one response; only CORRECT earns the reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    ERROR = "error"  # the verifier raised, died or returned no bool
    TIMEOUT = "timeout"  # it was killed at its deadline, or raised TimeoutError


Verifier: TypeAlias = Callable[[Question, str], bool]
"""Takes a question and a response's text; True if the response is correct."""

Judge: TypeAlias = Callable[[Sequence[tuple[Question, str]]], list[Outcome]]
"""Judges many responses at one time and keeps their order: VerifierPool.judge."""

VERIFIERS: dict[str, Verifier] = {"numeric": match.numeric, "exact": match.exact}
"""Verifiers by comparison of the final answer: as a number, and as text."""
