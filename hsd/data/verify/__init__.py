"""Verifiers: was a response correct? One name in VERIFIERS for each.

A verifier sees model text, which is untrusted: it neither runs it nor raises on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from hsd.data.questions import Question
from hsd.data.verify import match

Verifier: TypeAlias = Callable[[Question, str], bool]
"""Takes a question and a response's text; True if the response is correct."""

VERIFIERS: dict[str, Verifier] = {"numeric": match.numeric, "exact": match.exact}
