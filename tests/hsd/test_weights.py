"""Token weights: the paper's mean, the loss mask, and the divergence window."""

from __future__ import annotations

from typing import Literal

import pytest

from hsd.objective.weights import sequence_weights, window_mask


@pytest.mark.parametrize(
    ("correct", "divergence", "window", "kept"),
    [
        pytest.param(False, 2, 0, 3, id="up to and with the divergence"),
        pytest.param(False, 2, 1, 4, id="and the tokens of the window behind it"),
        pytest.param(False, 0, 0, 1, id="divergence at the first token"),
        pytest.param(False, 4, 100, 5, id="window beyond the end"),
        pytest.param(False, 5, 0, 5, id="a prefix of its peer"),
        pytest.param(False, None, 3, 0, id="failed without a peer: nothing"),
        pytest.param(True, 1, 0, 5, id="correct: all"),
        pytest.param(True, None, 0, 5, id="correct without a peer: all"),
        pytest.param(False, 2, "none", 5, id="no window: all"),
        pytest.param(False, None, "none", 5, id="no window and no peer: all"),
    ],
)
def test_window_mask(
    correct: bool, divergence: int | None, window: int | Literal["none"], kept: int
) -> None:
    mask = window_mask(5, correct=correct, divergence=divergence, window=window)
    assert mask == [True] * kept + [False] * (5 - kept)


def test_weights_are_the_mean_over_tokens_then_group_then_questions() -> None:
    lengths = [[3, 7], [1, 20]]  # two questions with groups of two
    means = []
    for group in lengths:
        for length in group:
            kept = [True] * length
            weights = sequence_weights(kept, kept, group_size=2, questions=2)
            assert weights == pytest.approx([1 / (length * 2 * 2)] * length)
            means.append(sum(weights))
    assert sum(means) == pytest.approx(1)


def test_tokens_that_the_policy_did_not_choose_weigh_nothing() -> None:
    weights = sequence_weights([True, False, True, False], [True] * 4, group_size=1, questions=1)
    assert weights == (0.5, 0.0, 0.5, 0.0)


def test_a_window_takes_weight_away_and_gives_none_to_the_rest() -> None:
    kept = [True, True, False, False]
    assert sequence_weights([True] * 4, kept, group_size=1, questions=1) == (0.25, 0.25, 0.0, 0.0)


def test_a_rollout_without_tokens_of_its_own_weighs_nothing() -> None:
    assert sequence_weights([False] * 2, [True] * 2, group_size=1, questions=1) == (0.0, 0.0)
    assert sequence_weights([], [], group_size=1, questions=1) == ()
