"""The teacher contexts whose credit can be looked at, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from hsd.credit.source import CreditGroup
from hsd.data.contexts import ContextBuilder, ContextConfig
from hsd.data.questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ContextName = Literal["answer", "peer", "answer_peer", "other_prompt", "none"]

# name: (show_answer, show_peer, what a rollout without a peer gets)
_SHOWN: dict[ContextName, tuple[bool, bool, Literal["answer", "skip"]]] = {
    "answer": (True, False, "answer"),
    "peer": (False, True, "skip"),
    "answer_peer": (True, True, "answer"),
    "other_prompt": (True, True, "skip"),
    "none": (False, False, "skip"),
}


class CreditContexts:
    """Builds the prompts of the student and of every teacher context.

    Args:
        tokenizer: the model's.
        config: of the run; what its teacher sees is replaced by each context's own.
        names: contexts, in the order they are shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: ContextConfig,
        names: Iterable[ContextName],
    ) -> None:
        self._builders = {}
        for name in names:
            answer, peer, fallback = _SHOWN[name]
            changed = dataclasses.replace(
                config,
                show_answer=answer,
                show_peer=peer,
                show_demonstration=False,
                fallback=fallback if peer else "answer",  # nothing to fall back from
            )
            self._builders[name] = ContextBuilder(tokenizer, changed)
        self._student = ContextBuilder(tokenizer, config)

    def student(self, question: Question) -> list[int]:
        """The plain prompt."""
        return self._student.student(question)

    def teacher(self, group: CreditGroup, index: int, *, other: str | None) -> dict[str, list[int]]:
        """The prompts of the contexts that give this rollout a teacher.

        Args:
            index: of the rollout in its group.
            other: a successful response to another question, None if there is none.
        """
        peer = group.peers[index]
        own = None if peer is None else group.texts[peer]
        prompts: dict[str, list[int]] = {}
        for name, builder in self._builders.items():
            shown = other if name == "other_prompt" else own
            context = builder.teacher(group.question, peers=[] if shown is None else [shown])
            if context is not None:
                prompts[name] = context.token_ids
        return prompts


class OtherSuccesses:
    """A success of another question for each group, in memory for two questions only.

    It is the latest one before the group; groups ahead of the first such success get one of
    the first that come.

    Args:
        groups: as they will come; read until two questions with a success are found.
    """

    def __init__(self, groups: Iterable[CreditGroup]) -> None:
        self._latest: dict[str, str] = {}  # question id -> text, oldest first
        for group in groups:
            self.add(group)
            if len(self._latest) == 2:
                break

    def for_question(self, question_id: str) -> str | None:
        """The text of the latest success of another question."""
        others = [text for question, text in self._latest.items() if question != question_id]
        return others[-1] if others else None

    def add(self, group: CreditGroup) -> None:
        """Remembers the group's first success."""
        for text, reward in zip(group.texts, group.rewards, strict=True):
            if reward:
                self._latest.pop(group.question.id, None)
                self._latest[group.question.id] = text
                while len(self._latest) > 2:
                    del self._latest[next(iter(self._latest))]
                return
