"""The trainer's update and TRL's are the same computation, or the comparison says so."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import update
from hsd.policy.load import load_policy
from hsd.policy.packing import TrainingRow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_sdpo", ROOT / "examples" / "trl_sdpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example, tmp_path_factory) -> str:
    """A tiny random model and its byte tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny")
    trainer = example.make_trainer(str(folder), example.SDPOTrainer, teacher_model_kind="live")
    trainer.processing_class.save_pretrained(folder / "model")
    return str(folder / "model")


def rows() -> list[TrainingRow]:
    """Of unequal lengths on both sides, some twice."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 200, (length,), generator=generator).tolist())

    made = [
        TrainingRow(
            student_prompt=ids(3 + i),
            teacher_prompt=ids(9 - i),
            response=ids(2 + i),
            weights=(1.0,) * (2 + i),
            logprobs=(-1.0,) * (2 + i),
        )
        for i in range(4)
    ]
    return made + made[:2]


def test_equal_rows_are_taken_once_and_weights_are_a_mean_of_means():
    chosen = update.weighted(rows(), 100)
    assert len(chosen) == 4
    assert [sum(row.weights) for row in chosen] == pytest.approx([0.25] * 4)
    assert len(update.weighted(rows(), 3)) == 2


def test_short_rollouts_are_joined_behind_the_first_prompts():
    given = rows()  # responses of 2, 3, 4, 5, ... tokens
    first, second, third = update.joined(given[:4], 4)
    assert first.response == given[0].response + given[1].response[:2]
    assert second.response == given[2].response
    assert third.response == given[3].response[:4]
    assert [row.student_prompt for row in (first, second, third)] == [
        given[i].student_prompt for i in (0, 2, 3)
    ]
    assert all(len(row.logprobs) == len(row.weights) == 4 for row in (first, second, third))


@pytest.mark.parametrize("side", ["ours", "trl"])
def test_the_peak_of_a_side_is_above_nothing(model, side):
    few, many = (update.extra_bytes(side, update.weighted(rows(), n), model) for n in (2, 100))
    assert 0 < few < many


def test_both_updates_have_the_same_gradient(model):
    found = update.compare(update.weighted(rows(), 100), model, rounds=1)
    assert found["gradient_difference"] <= 1e-4
    # The longest teacher sequence has 11 tokens; TRL pads prompts and responses apart: 9 + 5.
    assert found["padded_tokens"] == {"ours": 4 * 11, "trl": 4 * 14}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values())


def test_a_loss_that_is_not_the_same_shows(model, tmp_path):
    chosen = update.weighted(rows(), 100)
    heavier = [
        dataclasses.replace(row, weights=tuple(1.05 * w for w in row.weights)) for row in chosen
    ]
    (first, tokenizer), (second, _) = load_policy(model), load_policy(model)
    side, _ = update.ours(first, heavier)
    theirs = update.trl(second, tokenizer, chosen, str(tmp_path))
    assert update.gradient_difference(side, theirs) == pytest.approx(0.05, rel=0.01)
