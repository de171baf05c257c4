"""The parts of an objective one by one: filters, advantages, means, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hsd.objective.advantage import ADVANTAGES, shaped_rewards
from hsd.objective.config import ObjectiveConfig
from hsd.objective.group_filter import GROUP_FILTERS
from hsd.objective.normalisation import NORMALISATIONS, StepTotals
from hsd.objective.schedule import Scalar, value_at
from hsd.objective.token_loss import (
    TOKEN_LOSSES,
    TokenBatch,
    TokenLossOptions,
)


@pytest.mark.parametrize(
    ("rewards", "mixed"),
    [([True, False], True), ([True, True], False), ([False, False], False)],
)
def test_the_mixed_filter_keeps_groups_with_both_outcomes(rewards: list[bool], mixed: bool) -> None:
    assert GROUP_FILTERS["mixed"](rewards) is mixed
    assert GROUP_FILTERS["all"](rewards)


def test_advantages_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    assert ADVANTAGES["centred"](rewards) == [0.5, -0.5, -0.5, 0.5]
    deviation = math.sqrt(4 * 0.25 / 3)
    expected = [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation]
    assert ADVANTAGES["standardised"](rewards) == pytest.approx(expected, rel=1e-5)
    assert ADVANTAGES["none"](rewards) == [0.0] * 4


@pytest.mark.parametrize("name", ["centred", "standardised", "none"])
def test_equal_rewards_have_no_advantage(name: str) -> None:
    for reward in (0.0, 1.0, 0.1, 1 / 3):
        assert ADVANTAGES[name]([reward] * 7) == pytest.approx([0.0] * 7, abs=1e-9)


def test_the_reward_falls_over_the_last_tokens() -> None:
    rewards = shaped_rewards(
        [True, True, True, False],
        [6, 7, 10, 10],
        overlong_tokens=4,
        overlong_penalty=0.5,
        max_new_tokens=10,
    )
    assert rewards == [1.0, 1.0 - 0.125, 0.5, -0.5]


def test_without_overlong_tokens_length_does_not_matter() -> None:
    rewards = shaped_rewards(
        [True, False], [10, 10], overlong_tokens=0, overlong_penalty=0.5, max_new_tokens=10
    )
    assert rewards == [1.0, 0.0]


LENGTHS = [[3, 7], [1, 20], [5, 0]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence", lambda own, group: 1 / (own * 2 * 3) if own else 0.0),
        ("token", lambda own, group: 1 / (sum(group) * 3)),
        ("token_global", lambda own, group: 1 / 36),
        ("constant", lambda own, group: 1 / (32 * 2 * 3)),
    ],
)
def test_the_weight_of_a_token(name: str, value: Callable[[int, list[int]], float]) -> None:
    totals = StepTotals(questions=3, tokens=sum(map(sum, LENGTHS)), max_new_tokens=32)
    for group in LENGTHS:
        found = NORMALISATIONS[name](group, totals)
        assert found == pytest.approx([value(own, group) for own in group])


@pytest.mark.parametrize("name", ["sequence", "token", "token_global"])
def test_a_loss_of_one_per_token_has_a_mean_of_one(name: str) -> None:
    groups = [[3, 7], [1, 20]]
    totals = StepTotals(questions=2, tokens=31, max_new_tokens=32)
    total = sum(
        length * weight
        for group in groups
        for length, weight in zip(group, NORMALISATIONS[name](group, totals), strict=True)
    )
    assert total == pytest.approx(1)


@pytest.mark.parametrize(
    ("scalar", "values"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        (((2, 1.0), (6, 0.0)), [1.0, 0.5, 0.0]),
        (((4, 3.0),), [3.0, 3.0, 3.0]),
        (((0, 0.0), (4, 1.0), (5, 7.0)), [0.0, 1.0, 7.0]),
    ],
)
def test_schedules_are_lines_through_their_points(scalar: Scalar, values: list[float]) -> None:
    assert [value_at(scalar, step) for step in (0, 4, 9)] == values


def batch(**changes: Any) -> TokenBatch:
    parts: dict[str, Any] = {
        "lengths": [2, 1],
        "advantages": torch.tensor([1.0, 1.0, -2.0]),
        "old_logprobs": torch.tensor([-1.0, -2.0, -3.0]),
        "own": torch.tensor([True, True, True]),
        "distilled": torch.tensor([True, False, True]),
        "logprob": torch.tensor([-0.9, -1.9, -3.0]),
        "teacher_logprob": torch.tensor([-0.8, torch.nan, -2.95]),
    }
    return TokenBatch(**parts | changes)


def test_tokens_without_a_teacher_keep_their_advantage() -> None:
    options = TokenLossOptions(clip_range=(0.2, 0.2), teacher_mix=0.5, teacher_clip=0.2)
    found = TOKEN_LOSSES["teacher_weighted"](batch(), options).arguments["advantages"]
    expected = [0.5 + 0.5 * math.exp(0.1), 1.0, -2.0 * (0.5 + 0.5 * math.exp(-0.05))]
    assert found.tolist() == pytest.approx(expected)


def test_tokens_of_others_are_not_in_the_ratio_of_a_rollout() -> None:
    options = TokenLossOptions(clip_range=(0.2, 0.2), teacher_mix=1.0, teacher_clip=0.2)
    masked = batch(
        own=torch.tensor([True, False, True]), logprob=torch.tensor([-0.9, torch.nan, -3.0])
    )
    found = TOKEN_LOSSES["sequence_ratio"](masked, options).arguments["advantages"]
    assert found.tolist() == pytest.approx([math.exp(0.1), math.exp(0.1), -2.0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"jsd_beta": 0.3}, "jsd_beta: found 0.3, expected objective.divergence"),
        ({"teacher_decay": 0.5}, "teacher_decay: found 0.5, expected objective.teacher = 'ema'"),
        ({"teacher": "none"}, "teacher: found 'none', expected one for divergence"),
        ({"advantage": "centred"}, "advantage: found 'centred', expected a policy gradient"),
        ({"clip_range": (0.1, 0.1)}, "clip_range: found"),
        ({"pg_coef": 0.5}, "pg_coef: found 0.5, expected a policy gradient"),
        ({"overlong_tokens": 3}, "overlong_tokens: found 3, expected a policy gradient"),
        ({"token_loss": "token_ratio"}, "token_loss: found 'token_ratio', expected objective.adv"),
        ({"teacher_mix": 0.5}, "teacher_mix: found 0.5, expected objective.token_loss"),
        ({"teacher_mix": 1.5}, "teacher_mix: found 1.5, expected 0 to 1"),
        ({"ref_refresh_decay": 0.5}, "ref_refresh_decay: found 0.5, expected objective.ref_ref"),
        ({"overlong_penalty": 0.1}, "overlong_penalty: found 0.1, expected objective.overlong"),
        ({"kl_coef": ()}, "kl_coef: found no point"),
        ({"kl_coef": ((3, 1.0), (3, 2.0))}, r"kl_coef: found steps \[3, 3\]"),
        ({"kl_coef": -1.0}, "kl_coef: found -1.0"),
        (
            {
                "teacher": "none",
                "token_loss": "token_ratio",
                "advantage": "centred",
                "mask": "failures",
            },
            "mask: found 'failures', expected a teacher",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"objective.{named}"):
        ObjectiveConfig(**options)
