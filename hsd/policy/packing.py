"""From rollouts to micro-batches of a token budget, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One rollout as the loss sees it.

    Attributes:
        student_prompt, teacher_prompt: token ids to the left of the response.
        response: token ids; the same on both sides.
        weights: one per response token; they hold masks and normalisation.
        logprobs: the engine's, of the response tokens, nats.
        advantage: of every token, in the policy gradient.
        distilled: tokens that have a teacher; None if all have.
    """

    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    response: tuple[int, ...]
    weights: tuple[float, ...]
    logprobs: tuple[float, ...]
    advantage: float = 0.0
    distilled: tuple[bool, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.student_prompt), len(self.teacher_prompt)) + len(self.response)


def merge_equal(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Rows that agree in all but weights and log-probs become one whose weights are their sum.

    Exact: the loss is linear in the weights. Short answers repeat within a group.
    """
    merged: dict[object, TrainingRow] = {}
    for row in rows:
        parts = (row.student_prompt, row.teacher_prompt, row.response)
        key = (*parts, row.advantage, row.distilled)
        if key in merged:
            weights = zip(merged[key].weights, row.weights, strict=True)
            row = replace(merged[key], weights=tuple(a + b for a, b in weights))
        merged[key] = row
    return list(merged.values())


def without_idle_ends(rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Cuts each response behind its last token with weight, and drops rows without any.

    Exact: in a causal model later tokens do not change earlier ones.
    """
    cut = []
    for row in rows:
        length = max((i + 1 for i, weight in enumerate(row.weights) if weight != 0), default=0)
        if length:
            cut.append(
                replace(
                    row,
                    response=row.response[:length],
                    weights=row.weights[:length],
                    logprobs=row.logprobs[:length],
                    distilled=None if row.distilled is None else row.distilled[:length],
                )
            )
    return cut


def micro_batches(
    rows: Sequence[TrainingRow], *, token_budget: int, packed: bool = False
) -> list[list[TrainingRow]]:
    """Splits rows so that each batch stays within the budget; one row at least each.

    Args:
        packed: batches hold no padding, and the budget counts none.
    """
    if packed:
        return _packed_batches(rows, token_budget)
    batches: list[list[TrainingRow]] = []
    for row in sorted(rows, key=lambda row: row.length):
        # Sorted by length: the row at hand is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * row.length <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _packed_batches(rows: Sequence[TrainingRow], token_budget: int) -> list[list[TrainingRow]]:
    """The longest row first, each into the first batch that has room for it."""
    batches: list[list[TrainingRow]] = []
    tokens: list[int] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        place = next(
            (i for i, used in enumerate(tokens) if used + row.length <= token_budget), len(batches)
        )
        if place == len(batches):
            batches.append([])
            tokens.append(0)
        batches[place].append(row)
        tokens[place] += row.length
    return batches


def pad_right(
    sequences: Sequence[Sequence[int]], *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) int64 each; padding is id 0 under mask 0."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros((len(sequences), length), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def pack(
    sequences: Sequence[Sequence[int]], *, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences in one row of T tokens.

    Returns:
        token ids (1, T) int64; positions (1, T) int64, from 0 in each sequence; and offsets
        (B + 1,) int32, where sequences start and the last ends.
    """
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    lengths = torch.tensor([0, *(len(sequence) for sequence in sequences)])
    offsets = lengths.cumsum(0).to(torch.int32)
    return ids.to(device), positions.to(device), offsets.to(device)
