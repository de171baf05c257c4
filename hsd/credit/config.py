"""Credit of a sample of groups during training: what is measured, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from hsd.checks import require
from hsd.credit.contexts import ContextName


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Credit during training, as `hsd credit` measures it: docs/credit.md.

    Args:
        every: steps between two measurements, which go into credit/step-N of the run; 0 for none.
        groups: of the step, the first ones.
        contexts: what the teacher sees: answer, peer, answer_peer, other_prompt, none.
    """

    every: int = 0
    groups: int = 8
    contexts: tuple[ContextName, ...] = ("answer_peer", "answer")

    def __post_init__(self) -> None:
        require("credit.every", self.every, self.every >= 0, ">= 0")
        require("credit.groups", self.groups, self.groups >= 1, ">= 1")
        names = self.contexts
        different = bool(names) and len(set(names)) == len(names)
        expected = f"different ones of {', '.join(get_args(ContextName))}"
        require("credit.contexts", names, different, expected)
