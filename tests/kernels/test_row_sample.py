"""A sum over rows, read from some of them."""

from __future__ import annotations

import pytest
import torch

from hsd_kernels.row_sample import row_sample, sample_size
from hsd_kernels.statistics import DIFFERENTIABLE, Coefficients, Row

ROWS = 1024


def chunk(name: str) -> tuple[torch.Tensor, Coefficients, torch.Tensor]:
    """Statistics and coefficients of rows whose gradients differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    statistics = torch.full((len(Row), ROWS), torch.nan)
    for line in (Row.FORWARD_KL, Row.REVERSE_KL, Row.JSD, Row.REF_KL):
        statistics[line] = torch.exp(2 * torch.randn(ROWS, generator=generator) - 5)
    zero = torch.zeros(ROWS)
    along = dict.fromkeys(DIFFERENTIABLE, zero) | {name: torch.rand(ROWS, generator=generator)}
    temperature = 0.5 + torch.rand(ROWS, generator=generator)
    return statistics, Coefficients(**along), temperature


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_sums_of_large_and_of_uniform_terms_are_near_the_truth(name):
    statistics, along, temperature = chunk(name)
    rows, weights = row_sample(statistics, along, temperature)
    assert len(rows) <= sample_size(ROWS) == 128
    assert (rows.diff() > 0).all()
    noise = 0.5 + torch.rand(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lines = {"forward_kl": Row.FORWARD_KL, "reverse_kl": Row.REVERSE_KL}
    lines |= {"jsd": Row.JSD, "ref_kl": Row.REF_KL}
    size = statistics[lines[name]] if name in lines else 1
    squares = (getattr(along, name) * temperature).square() * size
    for terms in (squares * noise, noise):
        assert (terms[rows] @ weights).item() == pytest.approx(terms.sum().item(), rel=0.1)


def test_a_sum_of_large_terms_from_equal_steps_is_not():
    statistics, along, temperature = chunk("forward_kl")
    squares = (along.forward_kl * temperature).square() * statistics[Row.FORWARD_KL]
    assert abs(8 * squares[::8].sum() / squares.sum() - 1) > 0.1


def test_few_rows_are_all_taken():
    statistics, along, temperature = chunk("forward_kl")
    few = Coefficients(*(c[:60] for c in along))
    rows, weights = row_sample(statistics[:, :60], few, temperature[:60])
    assert rows.tolist() == list(range(60))
    assert (weights == 1).all()


def test_without_a_gradient_it_is_uniform():
    statistics, along, temperature = chunk("forward_kl")
    rows, weights = row_sample(statistics, Coefficients(*(0 * c for c in along)), temperature)
    assert len(rows) == 128
    assert rows.diff().unique().tolist() == [8]
    torch.testing.assert_close(weights, torch.full_like(weights, 8))
