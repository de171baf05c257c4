"""Token losses: arithmetic on per-token statistics, against formulas by hand and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hsd_kernels.statistics import DIFFERENTIABLE
from hsd_kernels.token_losses import HsdLoss, clipped_policy_gradient

N = 5


def statistics(**given: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.rand(N, generator=generator, dtype=torch.float64) for name in DIFFERENTIABLE
    }
    return drawn | given


def inputs(**given: Tensor) -> dict[str, Tensor]:
    return {"token_weights": torch.linspace(0.5, 1.5, N, dtype=torch.float64), **given}


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def derivatives(loss: HsdLoss, stats: dict[str, Tensor], given: dict[str, Tensor]) -> dict:
    leaves = {name: value.clone().requires_grad_() for name, value in stats.items()}
    gradients = torch.autograd.grad(
        loss(leaves, given).sum(), list(leaves.values()), allow_unused=True
    )
    return {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    loss = HsdLoss(
        divergence="jsd",
        divergence_scale=4.0,
        kl_coef=0.5,
        ref_coef=0.1,
        pg_coef=2.0,
        entropy_coef=0.3,
        clip_range=(0.1, 0.2),
    )
    kl_weights, ref_weights, pg_weights = torch.rand(3, N, dtype=torch.float64)
    advantages, old = values(1, -1, 2, -2, 0), values(0.1, 0.2, 0.3, 0.4, 0.5)
    given = inputs(
        kl_weights=kl_weights,
        ref_weights=ref_weights,
        pg_weights=pg_weights,
        advantages=advantages,
        old_logprobs=old,
    )
    s = statistics()
    rho = (s["logprob"] - old).exp()
    pg = -torch.minimum(rho * advantages, rho.clamp(0.9, 1.2) * advantages)
    expected = (
        0.5 * kl_weights * 4.0 * s["jsd"]
        + 0.1 * ref_weights * s["ref_kl"]
        + 2.0 * pg_weights * pg
        - 0.3 * s["entropy"]
    )
    torch.testing.assert_close(loss(s, given), expected)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_only_the_chosen_divergence_carries_a_gradient(divergence):
    found = derivatives(HsdLoss(divergence=divergence), statistics(), inputs())
    assert found.keys() == {divergence}
    torch.testing.assert_close(found[divergence], torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize(
    "loss",
    [
        HsdLoss(divergence="forward_kl", kl_coef=0.0),
        HsdLoss(divergence=None),
        HsdLoss(divergence="forward_kl", kl_coef=0.0, token_kl_cap=1.0),
    ],
)
def test_a_term_without_a_coefficient_is_not_read(loss):
    nothing = dict.fromkeys(DIFFERENTIABLE, torch.full((N,), torch.nan, dtype=torch.float64))
    assert loss(nothing, inputs()).count_nonzero() == 0


def test_the_cap_bounds_the_value_and_keeps_the_direction():
    kl, cap = values(0.1, 1.0, 2.0, 8.0, 0.0), 1.0
    loss = HsdLoss(divergence="forward_kl", token_kl_cap=cap)
    stats = statistics(forward_kl=kl)
    torch.testing.assert_close(loss(stats, inputs()), kl.clamp(max=cap))
    found = derivatives(loss, stats, inputs())["forward_kl"]
    torch.testing.assert_close(found, values(1, 1, 0.5, 0.125, 1))


def test_the_cap_is_on_the_scaled_divergence():
    loss = HsdLoss(divergence="jsd", divergence_scale=10.0, token_kl_cap=1.0)
    stats = statistics(jsd=torch.full((N,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(loss(stats, inputs()), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("cap", [None, 0.5])
def test_a_statistic_that_was_not_computed_reaches_neither_loss_nor_gradient(cap):
    """Rows whose weight is zero hold NaN."""
    loss = HsdLoss(divergence="forward_kl", ref_coef=1.0, token_kl_cap=cap)
    weights = values(1, 0, 1, 0, 1)
    missing = torch.where(weights == 0, torch.nan, 1.0)
    stats = statistics(forward_kl=missing, ref_kl=missing)
    given = inputs(kl_weights=weights, ref_weights=weights)
    assert loss(stats, given).isfinite().all()
    for name in ("forward_kl", "ref_kl"):
        found = derivatives(loss, stats, given)[name]
        assert found.isfinite().all()
        assert torch.equal(found != 0, weights != 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # inside
        (1.5, 2.0, -2.6, 0.0),  # raised enough: clipped at 1 + high
        (0.5, 2.0, -1.0, -1.0),  # lowered although good: not clipped
        (0.5, -2.0, 1.6, 0.0),  # lowered enough: clipped at 1 - low
        (1.5, -2.0, 3.0, 3.0),  # raised although bad: not clipped
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_policy_gradient(ratio, advantage, value, slope):
    """The slope is by the log-prob, so ratio * d value / d ratio."""
    logprob = values(-1.0).requires_grad_()
    old = values(-1.0 - math.log(ratio))
    loss = clipped_policy_gradient(logprob, old, values(advantage), clip_range=(0.2, 0.3))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    torch.testing.assert_close(loss.detach(), values(value))
    torch.testing.assert_close(gradient, values(slope))


def test_without_old_logprobs_the_gradient_is_that_of_reinforce():
    logprob = values(-0.5, -2.0).requires_grad_()
    advantages = values(1.5, -0.5)
    loss = clipped_policy_gradient(logprob, None, advantages, clip_range=(0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    torch.testing.assert_close(loss.detach(), -advantages)
    torch.testing.assert_close(gradient, -advantages)


def test_torch_func_gives_the_derivatives_of_autograd():
    """Autograd does not run inside the op; torch.func is what differentiates a loss there."""
    loss = HsdLoss(divergence="reverse_kl", ref_coef=0.5, entropy_coef=0.1, token_kl_cap=0.4)
    given = inputs(advantages=values(1, -1, 1, -1, 1), old_logprobs=values(0, 0.5, 1, 0.1, 0.9))
    stats = statistics()
    found = torch.func.grad(lambda s: loss(s, given).sum())(stats)
    for name, expected in derivatives(loss, stats, given).items():
        torch.testing.assert_close(found[name], expected)
