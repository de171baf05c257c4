"""What the difference between engine and trainer does to the weights of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, log, nan
from typing import Any, Literal

import pytest
import torch

from hsd.config import ObjectiveConfig
from hsd.objective.mismatch import mismatch_factors
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy

MakePolicy = Callable[..., Policy]
MakeRow = Callable[..., TrainingRow]
Bound = float | Literal["none"]


# Ratios of three rollouts of 3, 1 and 2 tokens; the geometric means are 2, 1/4 and 1.
RATIOS = [4.0, 2.0, 1.0, 0.25, 8.0, 0.125]


@pytest.mark.parametrize(
    ("cap", "mask", "expected"),
    [
        pytest.param("none", "none", [1, 1, 1, 1, 1, 1], id="off"),
        pytest.param(3.0, "none", [3, 2, 1, 0.25, 3, 0.125], id="truncated above, not below"),
        pytest.param("none", 1.99, [0, 0, 0, 0, 1, 1], id="both directions are masked"),
        pytest.param("none", 2.01, [1, 1, 1, 0, 1, 1], id="by the rollout, not by the token"),
        pytest.param(2.0, 2.01, [2, 2, 1, 0, 2, 0.125], id="both"),
        pytest.param("none", 1.0, [0, 0, 0, 0, 1, 1], id="equal is inside"),
    ],
)
def test_factors(cap: Bound, mask: Bound, expected: list[float]) -> None:
    log_ratio = torch.tensor(RATIOS).log()
    own = torch.ones(6, dtype=torch.bool)
    factors = mismatch_factors(log_ratio, [3, 1, 2], own, importance_cap=cap, sequence_mask=mask)
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("unknown", [nan, inf, 50.0])
def test_tokens_without_weight_do_not_count_in_the_mean(unknown: float) -> None:
    log_ratio = torch.tensor([log(2), unknown, log(2), unknown])
    own = torch.tensor([True, False, True, False])
    factors = mismatch_factors(log_ratio, [3, 1], own, importance_cap=9.0, sequence_mask=2.1)
    torch.testing.assert_close(factors, torch.tensor([2.0, 1.0, 2.0, 1.0]))


def run(policy: Policy, rows: list[TrainingRow], **options: Any) -> tuple[dict[str, float], Any]:
    policy.model.zero_grad()
    objective = ObjectiveConfig(ref_coef=0.3, **options)
    sums, _ = accumulate_gradients(policy, rows, objective, micro_batch_tokens=30, temperature=0.8)
    gradients = [parameter.grad for parameter in policy.model.parameters()]
    return dict(zip(SUMS, sums.tolist(), strict=True)), gradients


@pytest.mark.parametrize("teacher", ["live", "initial"])
def test_loss_and_gradient_are_those_of_weights_multiplied_beforehand(
    teacher: str, make_policy: MakePolicy, make_row: MakeRow
) -> None:
    """A first pass with log-probs of zero says what the policy's are, through the gap."""
    policy = make_policy(teacher=teacher)
    rows = [make_row(seed, response=1) for seed in range(3)]
    logprobs = []
    for row in rows:
        sums, _ = run(policy, [replace(row, logprobs=(0.0,))])
        logprobs.append(-sums["gap"])
    # The engine's: one far too low, one as it is, one a little too high.
    shifts = [-log(5), 0.0, log(1.25)]
    rows = [
        replace(row, logprobs=(logprob + shift,))
        for row, logprob, shift in zip(rows, logprobs, shifts, strict=True)
    ]
    for options, factors in (
        ({"importance_cap": 2.0}, [2.0, 1.0, 0.8]),
        ({"sequence_mask": 1.5}, [0.0, 1.0, 1.0]),
        ({"importance_cap": 2.0, "sequence_mask": 1.2}, [0.0, 1.0, 0.0]),
    ):
        scaled = [
            replace(row, weights=(factor * row.weights[0],))
            for row, factor in zip(rows, factors, strict=True)
        ]
        found, gradients = run(policy, rows, teacher=teacher, **options)
        expected, expected_gradients = run(policy, scaled, teacher=teacher)
        for name in ("loss", "kl", "ref_kl", "weight", "tokens"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_that_is_masked_altogether_has_no_gradient(
    make_policy: MakePolicy, make_row: MakeRow
) -> None:
    policy = make_policy()
    row = replace(make_row(0), logprobs=(5.0,) * 4)
    sums, gradients = run(policy, [row], sequence_mask=2.0)
    assert sums["loss"] == sums["weight"] == sums["tokens"] == 0
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_cap": 0.5}, "objective.importance_cap: found 0.5, expected >= 1 or none"),
        ({"sequence_mask": 0.0}, "objective.sequence_mask"),
        (
            {"importance_cap": 2.0, "token_loss": "token_ratio", "advantage": "centred"},
            "objective.importance_cap: .* objective.token_loss = 'divergence' beside it",
        ),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**options)
