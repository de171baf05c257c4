"""The rollouts of `benchmarks.update`, and the batch that TRL builds of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hsd.policy.packing import TrainingRow, pad_right


def weighted(rows: Sequence[TrainingRow], tokens: int) -> list[TrainingRow]:
    """The first rows with `tokens` response tokens, weighted as TRL does: a mean of means."""
    chosen: list[TrainingRow] = []
    for row in dict.fromkeys(rows):
        if sum(len(each.response) for each in chosen) >= tokens:
            break
        chosen.append(row)
    return [
        dataclasses.replace(row, weights=(1 / len(row.response) / len(chosen),) * len(row.response))
        for row in chosen
    ]


def joined(rows: Sequence[TrainingRow], length: int) -> list[TrainingRow]:
    """Rows of `length` response tokens, those of consecutive rows behind the first's prompts."""
    made: list[TrainingRow] = []
    held: list[TrainingRow] = []
    for row in rows:
        held.append(row)
        if sum(len(each.response) for each in held) >= length:
            response = tuple(token for each in held for token in each.response)[:length]
            logprobs = tuple(value for each in held for value in each.logprobs)[:length]
            weights = (1.0,) * length
            parts = {"response": response, "logprobs": logprobs, "weights": weights}
            made.append(dataclasses.replace(held[0], **parts))
            held = []
    return made


def trl_batch(rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
    """The tensors that TRL's `compute_loss` reads."""
    prompt_ids, prompt_mask = _pad_left([row.student_prompt for row in rows])
    hinted_ids, hinted_mask = _pad_left([row.teacher_prompt for row in rows])
    completion_ids, completion_mask = pad_right([row.response for row in rows])
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([hinted_ids, completion_ids], 1),
        "teacher_attention_mask": torch.cat([hinted_mask, completion_mask], 1),
        "self_distillation_mask": torch.ones(len(rows)),
    }


def _pad_left(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_right([sequence[::-1] for sequence in sequences])
    return ids.flip(1), mask.flip(1)


def padded_tokens(rows: Sequence[TrainingRow]) -> dict[str, int]:
    """Positions of the teacher's forward, padding included: TRL pads prompt and response apart."""
    longest = [max(len(row.teacher_prompt) for row in rows), max(len(r.response) for r in rows)]
    return {
        "ours": len(rows) * max(row.length for row in rows),
        "trl": len(rows) * sum(longest),
    }
