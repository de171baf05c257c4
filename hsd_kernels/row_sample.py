"""Rows of a chunk that stand for all, where a sum over them need not be known exactly."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.statistics import Coefficients, Row

_LEAST: Final = 64  # rows of a sample, in a chunk that has them
_SHARE: Final = 8  # of the rows, one in so many
_DIVERGENCES: Final = {
    "forward_kl": Row.FORWARD_KL,
    "reverse_kl": Row.REVERSE_KL,
    "jsd": Row.JSD,
    "ref_kl": Row.REF_KL,
}


class RowSample(NamedTuple):
    """A sum over all rows is that of these, each times its weight."""

    rows: Tensor  # (n,) int64 ascending
    weights: Tensor  # (n,) fp64, of how many rows each stands


def sample_size(count: int) -> int:
    """Rows of a sample of `count`, at least 1."""
    return max(min(count, _LEAST), count // _SHARE, 1)


def row_sample(
    statistics: Tensor, coefficients: Coefficients, inverse_temperature: Tensor
) -> RowSample:
    """Half of it by the size of a row's gradient, half uniform; the same rows in every run.

    A divergence's gradient is of the size of c (p - q), and |p - q|_1^2 <= 2 KL (Pinsker); those of
    other statistics are of the size of c.

    Args:
        statistics: (len(Row), C).
        coefficients: (C,) each, of the gradient.
        inverse_temperature: (C,) a factor of a row's gradient.
    """
    count = statistics.shape[1]
    size = sample_size(count)
    if size == count:
        return RowSample(torch.arange(count), torch.ones(count, dtype=torch.float64))
    squares = torch.zeros(count, dtype=torch.float64)
    for name, coefficient in coefficients._asdict().items():
        kl = statistics[_DIVERGENCES[name]] if name in _DIVERGENCES else torch.ones(count)
        squares += coefficient.double().square() * kl.nan_to_num().clamp(min=0)
    squares *= inverse_temperature.double().square()
    share = torch.nan_to_num(squares / squares.sum()) + 1 / count
    share /= share.sum()
    # Equal steps along the shares: no row far from its expected number of times.
    points = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    drawn = torch.searchsorted(share.cumsum(0), points).clamp(max=count - 1)
    rows, times = torch.unique_consecutive(drawn, return_counts=True)
    return RowSample(rows, times / (size * share[rows]))
