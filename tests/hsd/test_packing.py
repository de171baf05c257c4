"""Rows into micro-batches: exact, and within the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hsd.policy.packing import (
    TrainingRow,
    merge_equal,
    micro_batches,
    pack,
    pad_right,
    without_idle_ends,
)

MakeRow = Callable[..., TrainingRow]


def test_equal_rows_become_one_with_the_sum_of_their_weights(make_row: MakeRow) -> None:
    first, other = make_row(0, weights=(1.0, 2.0, 0.0, 4.0)), make_row(1)
    again = replace(first, weights=(10.0, 0.0, 30.0, 40.0))
    merged = merge_equal([first, other, again])
    assert merged == [replace(first, weights=(11.0, 2.0, 30.0, 44.0)), other]


@pytest.mark.parametrize("part", ["student_prompt", "teacher_prompt", "response"])
def test_rows_that_differ_anywhere_stay_apart(make_row: MakeRow, part: str) -> None:
    row = make_row(0)
    tokens = getattr(row, part)
    changed = replace(row, **{part: (tokens[0] ^ 1, *tokens[1:])})
    assert merge_equal([row, changed]) == [row, changed]


def test_the_last_token_of_a_prompt_is_not_taken_for_the_first_of_a_response() -> None:
    def row(prompt: tuple[int, ...], response: tuple[int, ...]) -> TrainingRow:
        ones = (1.0,) * len(response)
        return TrainingRow(
            student_prompt=prompt,
            teacher_prompt=prompt,
            response=response,
            weights=ones,
            logprobs=ones,
        )

    rows = [row((1, 2), (3,)), row((1,), (2, 3))]
    assert merge_equal(rows) == rows


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ((1.0, 1.0, 1.0, 1.0), 4),
        ((1.0, 0.0, 1.0, 0.0), 3),
        ((0.0, 1.0, 0.0, 0.0), 2),
        ((-1.0, 0.0, 0.0, 0.0), 1),
    ],
)
def test_a_response_ends_with_its_last_weight(
    make_row: MakeRow, weights: tuple[float, ...], kept: int
) -> None:
    row = make_row(0, weights=weights)
    (cut,) = without_idle_ends([row])
    assert cut == replace(
        row,
        response=row.response[:kept],
        weights=row.weights[:kept],
        logprobs=row.logprobs[:kept],
    )


def test_rows_without_weight_are_dropped(make_row: MakeRow) -> None:
    kept = make_row(1)
    assert without_idle_ends([make_row(0, weights=(0.0,) * 4), kept]) == [kept]


@pytest.mark.parametrize("budget", [1, 20, 37, 100, 10_000])
def test_batches_hold_every_row_once_within_the_budget(make_row: MakeRow, budget: int) -> None:
    rows = [make_row(n, context=n % 7, response=1 + n * 5 % 11) for n in range(30)]
    batches = micro_batches(rows, token_budget=budget)
    flat = [row for batch in batches for row in batch]
    assert sorted(flat, key=rows.index) == rows
    for batch in batches:
        padded = len(batch) * max(row.length for row in batch)
        assert padded <= budget or len(batch) == 1


def test_a_large_budget_needs_one_batch(make_row: MakeRow) -> None:
    assert len(micro_batches([make_row(n) for n in range(9)], token_budget=9 * 18)) == 1
    assert len(micro_batches([make_row(n) for n in range(9)], token_budget=9 * 18 - 1)) == 2


@pytest.mark.parametrize("budget", [1, 20, 37, 100, 10_000])
def test_packed_batches_hold_every_row_once_and_no_two_fit_into_one(
    make_row: MakeRow, budget: int
) -> None:
    rows = [make_row(n, context=n % 7, response=1 + n * 5 % 11) for n in range(30)]
    batches = micro_batches(rows, token_budget=budget, packed=True)
    flat = [row for batch in batches for row in batch]
    assert sorted(flat, key=rows.index) == rows
    tokens = sorted(sum(row.length for row in batch) for batch in batches)
    assert all(
        total <= budget or len(batch) == 1
        for batch in batches
        for total in [sum(row.length for row in batch)]
    )
    assert len(batches) == 1 or tokens[0] + tokens[1] > budget


def test_rows_of_uneven_length_need_fewer_batches_when_packed(make_row: MakeRow) -> None:
    rows = [make_row(n, response=86 if n % 3 == 0 else 36) for n in range(4)]
    assert len(micro_batches(rows, token_budget=300, packed=True)) == 1
    assert len(micro_batches(rows, token_budget=300)) == 2


@pytest.mark.parametrize("packed", [True, False])
def test_no_rows_make_no_batch(packed: bool) -> None:
    assert micro_batches([], token_budget=10, packed=packed) == []


def test_the_length_is_that_of_the_longer_side(make_row: MakeRow) -> None:
    row = make_row(0, prompt=5, context=9, response=4)
    assert row.length == 5 + 9 + 4
    swapped = replace(row, student_prompt=row.teacher_prompt, teacher_prompt=row.student_prompt)
    assert swapped.length == row.length


def test_packed_positions_start_again_with_each_sequence() -> None:
    ids, positions, offsets = pack([[5, 6, 7], [8], [9, 9]])
    assert torch.equal(ids, torch.tensor([[5, 6, 7, 8, 9, 9]]))
    assert torch.equal(positions, torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert torch.equal(offsets, torch.tensor([0, 3, 4, 6], dtype=torch.int32))


def test_padding_stands_on_the_right_under_a_mask_of_zeros() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]])
    assert torch.equal(ids, torch.tensor([[5, 6, 7], [8, 0, 0]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
