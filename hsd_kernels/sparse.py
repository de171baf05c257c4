"""Certified sparse backward: the two backward GEMMs on the columns that hold the gradient.

The logit gradient of a chunk has its mass in few columns of the vocabulary. The fewest that hold
all but a share `tolerance` of the chunk's L1 mass are kept, token weights included; the rest is
dropped, and reported row by row. That bounds the mass: a row's error in the hidden gradient is at
most its dropped mass times the largest norm of a head row. It does not bound a row's relative
error.
"""

from __future__ import annotations

from torch import Tensor

_MARGIN = 2**-10  # of the tolerance, and
_ROUNDING = 2**-22  # of the mass: so that rounding of fp32 sums cannot break the certificate
_WORTHWHILE = 0.5  # share of the columns above which gathering them costs more than it saves


def kept_columns(mass: Tensor, *, tolerance: float, max_columns: int | None) -> Tensor | None:
    """Columns to keep, (K,) int64 ascending; None where the chunk is to run dense.

    Waits for the device once, for their number.

    Args:
        mass: (V,) L1 mass of each column of the chunk's logit gradient.
        tolerance: share of it that may be dropped.
        max_columns: a chunk that needs more runs dense.
    """
    ordered, columns = mass.double().sort(descending=True, stable=True)
    enough = (1 - max(tolerance * (1 - _MARGIN) - _ROUNDING, 0)) * ordered.sum()
    count = int((ordered.cumsum(0) < enough).sum()) + 1
    limit = int(_WORTHWHILE * len(mass)) if max_columns is None else max_columns
    if count > limit:
        return None
    return columns[:count].sort().values
