"""The rollouts of a step as a table: what was sampled, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from hsd.objective.batch import JudgedRollout
from hsd.rollout.groups import Group


@dataclass(frozen=True, kw_only=True)
class CompletionRow:
    """One rollout.

    Attributes:
        peer: question, step and index of the first peer that its teacher was shown, if any.
        tokens: of the response.
        context_length: tokens of the teacher's prompt; None without a teacher.
    """

    question: str
    prompt: str
    completion: str
    reward: float
    peer: str | None
    tokens: int
    context_length: int | None


def completion_rows(
    judged: Iterable[tuple[Group, Sequence[JudgedRollout]]], count: int
) -> list[CompletionRow]:
    """The first rollouts of a step, one of each group in turn, `count` at most."""
    groups = [_rows(group, outcomes) for group, outcomes in judged if outcomes]
    longest = max(map(len, groups), default=0)
    in_turn = (rows[index] for index in range(longest) for rows in groups if index < len(rows))
    return [row for row, _ in zip(in_turn, range(count), strict=False)]


def _rows(group: Group, outcomes: Sequence[JudgedRollout]) -> list[CompletionRow]:
    rows = []
    for index, (rollout, outcome) in enumerate(zip(group.rollouts, outcomes, strict=True)):
        peer = outcome.peers.successes[0] if outcome.peers.successes else None
        rows.append(
            CompletionRow(
                question=group.question.id,
                prompt=group.question.prompt,
                completion=group.texts[index],
                reward=float(group.rewards[index]),
                peer=None if peer is None else f"{peer.question_id}/{peer.step + 1}/{peer.index}",
                tokens=len(rollout.token_ids),
                context_length=outcome.context_length,
            )
        )
    return rows


def completions_table(rows: Sequence[CompletionRow], *, title: str) -> Table:
    """Model text is shown, never interpreted."""
    table = Table(title=title, title_justify="left")
    for column in ("question", "completion", "reward", "peer", "tokens", "context"):
        numeric = column in ("reward", "tokens", "context")
        table.add_column(column, overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(
            Text(row.prompt),
            Text(row.completion),
            Text(f"{row.reward:g}", "green" if row.reward else "red"),
            Text(row.peer or "none"),
            str(row.tokens),
            "none" if row.context_length is None else str(row.context_length),
        )
    return table
