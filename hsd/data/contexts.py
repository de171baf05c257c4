"""Prompts of student and teacher, as token ids: the question, and the question with its context.

Both sides differ in the user turn only. What stands before and behind the user turn is rendered
once from the model's own chat template, and what stands behind it is tokenised on its own, so that
the response is predicted from the same last ids on both sides, unless a thinking switch is set on
one side alone.

Questions, answers and peers are untrusted: strings of special tokens are dropped from them, and no
special token can arise from their text. From what the teacher is shown beside the question, so are
the other tokens that structure a conversation, such as <think>; a question keeps those.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hsd.data.frames import Frame, chat_frame
from hsd.data.questions import Question, require_solutions
from hsd.data.templates import load_template
from hsd.data.untrusted import drop_strings, marker_tokens, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONING_END = "</think>"  # of Qwen3, DeepSeek-R1, GLM, SmolLM3


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What the teacher sees beside the question.

    With neither answer, demonstration nor peer the teacher's prompt is the student's: the control.

    Args:
        template: name of a template in templates.toml.
        system: the system message of both sides; None leaves it to the chat template.
        student_thinking: the chat template's thinking switch (Qwen3's enable_thinking) for the
            student, hence for rollouts; None leaves it to the template.
        teacher_thinking: likewise for the teacher. Set unlike the student's, it makes the two
            predict the response's first token from different ids.
        show_answer: show the correct final answer.
        show_demonstration: show the question's worked solution, its column `solution`.
        show_peer: show successful peers; which, the section peers says.
        fallback: what a rollout without a successful peer gets where peers are shown: the answer
            alone (also if show_answer is false), no teacher at all, or the policy gradient in
            the teacher's place, which rollouts with a peer then do without.
        peer_reasoning: "drop" shows of a peer only what follows its last </think>; one without
            that mark is shown whole.
        peer_token_budget: most tokens of each peer's text; only peers are ever cut.
        peer_keep: which part of a peer that is too long stays.
    """

    template: str = "default"
    system: str | None = None
    student_thinking: bool | None = None
    teacher_thinking: bool | None = None
    show_answer: bool = True
    show_demonstration: bool = False
    show_peer: bool = True
    fallback: Literal["answer", "skip", "policy_gradient"] = "answer"
    peer_reasoning: Literal["keep", "drop"] = "keep"
    peer_token_budget: int = 1024
    peer_keep: Literal["head", "tail", "middle"] = "tail"

    def __post_init__(self) -> None:
        if self.fallback not in ("answer", "skip", "policy_gradient"):
            found = f"{self.fallback!r}, expected answer, skip or policy_gradient"
            raise ValueError(f"context.fallback: found {found}")
        if self.fallback != "answer" and not self.show_peer:
            found = f"{self.fallback!r}, expected context.show_peer beside it"
            raise ValueError(f"context.fallback: found {found}")
        if self.peer_reasoning not in ("keep", "drop"):
            found = repr(self.peer_reasoning)
            raise ValueError(f"context.peer_reasoning: found {found}, expected keep or drop")
        if self.peer_keep not in ("head", "tail", "middle"):
            found = repr(self.peer_keep)
            raise ValueError(f"context.peer_keep: found {found}, expected head, tail or middle")
        budget = self.peer_token_budget
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(
                f"context.peer_token_budget: found {budget!r}, expected an integer of at least 1"
            )


@dataclass(frozen=True)
class Context:
    """The teacher's prompt for one rollout.

    Args:
        token_ids: the prompt, up to where the response begins.
        peer_truncated_tokens: tokens of peers that the budget cut away.
        special_tokens_removed: tokens of control dropped from the question and from all that is
            shown.
    """

    token_ids: list[int]
    peer_truncated_tokens: int
    special_tokens_removed: int


@dataclass(frozen=True, kw_only=True)
class _Side:
    """What stands around the turn of the student or of the teacher."""

    head: str
    head_specials: int
    tail_ids: tuple[int, ...]


class ContextBuilder:
    """Builds the prompts of one model.

    Args:
        tokenizer: the model's own, a fast one; without a chat template the plain text pair of the
            template is used.
        config: what the teacher sees.

    Raises:
        TypeError: the tokenizer gives no character offsets.
        ValueError: the template is incomplete, the chat template does not show the user's turn
            exactly once, or it lacks what the configuration sets of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ContextConfig) -> None:
        if not tokenizer.is_fast:
            found = type(tokenizer).__name__
            raise TypeError(f"tokenizer: found {found}, expected a fast one with character offsets")
        self._tokenizer = tokenizer
        self._config = config
        self._template = load_template(config.template)
        specials, markers = special_tokens(tokenizer), marker_tokens(tokenizer)
        self._special_texts = frozenset(specials.values())
        self._control_texts = self._special_texts | frozenset(markers.values())
        # An id for unknown words alone is no control token: plain text may give it.
        roles = [k for k, v in tokenizer.special_tokens_map.items() if v == tokenizer.unk_token]
        unknown = {tokenizer.unk_token_id} if roles == ["unk_token"] else set()
        self._special_ids = frozenset(specials.keys() - unknown)
        self._marker_ids = frozenset(markers)
        self._student_side = self._side(config.student_thinking, "context.student_thinking")
        self._teacher_side = self._side(config.teacher_thinking, "context.teacher_thinking")
        self._bos_ids = self._leading_ids()

    def student(self, question: Question) -> list[int]:
        """The plain prompt: the question alone."""
        turn, _ = drop_strings(question.prompt, self._special_texts)
        token_ids, _ = self._prompt(self._student_side, turn.strip(), "")
        return token_ids

    def teacher(
        self, question: Question, *, peers: Sequence[str], failed: str | None = None
    ) -> Context | None:
        """The prompt with its privileged context.

        Args:
            question: the question.
            peers: the successful peers' responses; not looked at unless peers are shown.
            failed: the response of a failed rollout, to be shown beside them.

        Returns:
            None if this rollout gets no teacher (fallback "skip" or "policy_gradient", or no answer
            to fall back to). An empty answer, as of code, is not shown.

        Raises:
            ValueError: the question has no demonstration, and one is to be shown.
        """
        config, template = self._config, self._template
        falls_back = config.show_peer and not peers
        if falls_back and (config.fallback != "answer" or not question.answer):
            return None
        turn, removed = drop_strings(question.prompt, self._special_texts)
        blocks, truncated = "", 0
        if question.answer and (config.show_answer or falls_back):
            answer, dropped = drop_strings(question.answer, self._control_texts)
            blocks += template.answer[0] + answer + template.answer[1]
            removed += dropped
        if config.show_demonstration:
            require_solutions([question], option="context.show_demonstration")
            solution, dropped = self._clean_peer(question.solution or "")
            blocks += template.demonstration[0] + solution + template.demonstration[1]
            removed += dropped
        if config.show_peer:
            shown = [(template.peer, text) for text in peers]
            if failed is not None:
                shown.append((template.failed, failed))
            for block, text in shown:
                cleaned, dropped = self._clean_peer(text)
                kept, cut = self._truncate(cleaned)
                blocks += block[0] + kept + block[1]
                removed += dropped
                truncated += cut
        if blocks:
            blocks += template.closing
        token_ids, dropped = self._prompt(self._teacher_side, turn.strip(), blocks)
        return Context(token_ids, truncated, removed + dropped)

    def _side(self, thinking: bool | None, option: str) -> _Side:
        """The frame of one side, its tail tokenised."""
        system = self._config.system
        if self._tokenizer.chat_template is not None:
            frame = chat_frame(self._tokenizer, system=system, thinking=thinking, option=option)
        else:
            for name, value in (("context.system", system), (option, thinking)):
                if value is not None:
                    found = f"{value!r} for a model without a chat template"
                    raise ValueError(f"{name}: found {found}, expected none")
            head, tail = self._template.plain
            frame = Frame(head=head, tail=tail)
        return _Side(
            head=frame.head,
            head_specials=_count(self._encode(frame.head), self._special_ids),
            tail_ids=tuple(self._encode(frame.tail)),
        )

    def _prompt(self, side: _Side, turn: str, blocks: str) -> tuple[list[int], int]:
        """Ids of the whole prompt, and how many control ids its texts gave that were dropped.

        Dropping strings is not enough where a tokenizer normalises text before it looks for its
        special tokens. The turn comes without white space around it: many chat templates trim it,
        and it would melt into the frame's tokens.
        """
        encoded = self._encode(side.head + turn + blocks)
        specials, markers = side.head_specials, 0
        if blocks and self._marker_ids.intersection(encoded):
            # Those of the question stand before all that the blocks may hold.
            markers = _count(self._encode(side.head + turn), self._marker_ids)
        elif not blocks:
            markers = len(encoded)
        kept = []
        for token_id in encoded:
            if token_id in self._special_ids:
                specials -= 1
                if specials < 0:
                    continue
            elif token_id in self._marker_ids:
                markers -= 1
                if markers < 0:
                    continue
            kept.append(token_id)
        return [*self._bos_ids, *kept, *side.tail_ids], len(encoded) - len(kept)

    def _clean_peer(self, peer: str) -> tuple[str, int]:
        """The peer without tokens of control and delimiters, and the number of the former."""
        if self._config.peer_reasoning == "drop":
            peer = peer.rpartition(_REASONING_END)[2]
        delimiters = {self._template.peer_open, self._template.peer_close}
        encodable = peer.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
        return drop_strings(encodable.strip(), self._control_texts, uncounted=delimiters)

    def _truncate(self, peer: str) -> tuple[str, int]:
        """The peer cut to its budget at token boundaries, and the number of tokens cut away."""
        encoded = self._tokenizer(
            peer, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets: list[tuple[int, int]] = encoded["offset_mapping"]
        budget = self._config.peer_token_budget
        excess = len(offsets) - budget
        if excess <= 0:
            return peer, 0
        first = {"head": 0, "middle": excess // 2, "tail": excess}[self._config.peer_keep]
        last = first + budget
        mark = self._template.truncation_mark
        start, end = offsets[first][0], offsets[last - 1][1]
        opening = f"{mark} " if first > 0 else ""
        ending = f" {mark}" if last < len(offsets) else ""
        return opening + peer[start:end].strip() + ending, excess

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        token_ids: list[int] = encoded["input_ids"]
        return token_ids

    def _leading_ids(self) -> list[int]:
        """The beginning-of-sequence id where the tokenizer adds one; chat templates write it."""
        bos = self._tokenizer.bos_token_id
        if self._tokenizer.chat_template is not None or bos is None:
            return []
        return [bos] if self._tokenizer("x")["input_ids"][0] == bos else []


def _count(token_ids: Sequence[int], wanted: Set[int]) -> int:
    return sum(token_id in wanted for token_id in token_ids)
