"""The statistics of a vocabulary row, and the linear span that holds all their gradients.

Notation (one token, its row of V logits; everything in nats):

    z, u, w   logits of student, teacher and reference, after scale, softcap and temperature
    p, q, r   their softmaxes;   m = b q + (1 - b) p the jsd mixture;   y the sampled token

Every loss of the family is a function of a few statistics of the row. The gradient of each
statistic with respect to z is one element of a small basis:

    | statistic  | value                     | gradient with respect to z               |
    |------------|---------------------------|------------------------------------------|
    | lse        | logsumexp(z)              | p                                        |
    | logprob    | z_y - lse                 | onehot(y) - p                            |
    | entropy    | H = -sum p log p          | -p (log p + H)                           |
    | forward_kl | F = sum q (log q - log p) | p - q                                    |
    | reverse_kl | L = sum p (log p - log q) | p (log p - log q - L)                    |
    | jsd        | b KL(q,m) + (1-b) KL(p,m) | (1-b) p (log p - log m - KL(p,m))        |
    | ref_kl     | R = sum p (log p - log r) | p (log p - log r - R)                    |

so that, for any loss,

    dL/dz = p (c.p + c.log_p * log p + c.teacher * (log p/q - L) + c.reference * (log p/r - R)
               + c.mixture * (log p/m - KL(p,m))) + c.difference * (p - q)
            + c.target * (onehot(y) - p)

with seven scalars per token: `Coefficients`. The basis is written in *differences* (log p/q, p - q)
and not in log p, log q, p and q: near the student the separate terms cancel to a few per mille of
their size, and fp32 would keep two digits of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple

import torch
from torch import Tensor


class Row(IntEnum):
    """The layout of what `row_stats` returns: fp32, shape (len(Row), C), one line per statistic.

    What was not asked for is NaN. `*_ANCHOR` and `*_LOG_RATIO` carry the log-ratio to the gradient
    pass at full precision: with k the other side's most likely token and
    e = (z - z_k) - (u - u_k), LOG_RATIO = log sum q exp(e), and log p - log q = e - LOG_RATIO.
    """

    MAX = 0  # max z
    LOG_SUM = 1  # lse - max
    LOGPROB = 2
    ENTROPY = 3
    TEACHER_MAX = 4
    TEACHER_LOG_SUM = 5
    TEACHER_ANCHOR = 6  # z_k, or (z - u)_k where the difference itself was computed
    TEACHER_LOG_RATIO = 7
    TEACHER_LOGPROB = 8
    TEACHER_ENTROPY = 9
    TOP1_AGREE = 10  # 1 where student and teacher share their most likely token
    FORWARD_KL = 11
    REVERSE_KL = 12
    JSD = 13
    STUDENT_MIXTURE_KL = 14  # KL(p, m), which the gradient of jsd needs
    REFERENCE_MAX = 15
    REFERENCE_LOG_SUM = 16
    REFERENCE_ANCHOR = 17
    REFERENCE_LOG_RATIO = 18
    REF_KL = 19
    # sum p (log p/q - L), and the like for m and r: what rounding leaves of a mean that is zero.
    # Where one token has nearly all of p, the gradient is smaller than the rounding of L itself.
    REVERSE_RESIDUAL = 20
    MIXTURE_RESIDUAL = 21
    REFERENCE_RESIDUAL = 22


DIFFERENTIABLE: Final = (
    "lse",
    "logprob",
    "entropy",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "ref_kl",
)
"""What a token loss may be differentiated by."""

DIVERGENCES: Final = ("forward_kl", "reverse_kl", "jsd")


class Coefficients(NamedTuple):
    """Coordinates of dL/dz in the basis of the module docstring; each fp32 of shape (C,)."""

    p: Tensor
    log_p: Tensor
    teacher: Tensor
    reference: Tensor
    mixture: Tensor
    difference: Tensor
    target: Tensor


def named_statistics(rows: Tensor) -> dict[str, Tensor]:
    """The statistics by the names that token losses use.

    Args:
        rows: (len(Row), C) fp32, what `row_stats` returned.

    Returns:
        name -> (C,): those of `DIFFERENTIABLE`, and the teacher's, which are constants.
    """
    return {
        "lse": rows[Row.MAX] + rows[Row.LOG_SUM],
        "logprob": rows[Row.LOGPROB],
        "entropy": rows[Row.ENTROPY],
        "forward_kl": rows[Row.FORWARD_KL],
        "reverse_kl": rows[Row.REVERSE_KL],
        "jsd": rows[Row.JSD],
        "ref_kl": rows[Row.REF_KL],
        "teacher_lse": rows[Row.TEACHER_MAX] + rows[Row.TEACHER_LOG_SUM],
        "teacher_logprob": rows[Row.TEACHER_LOGPROB],
        "teacher_entropy": rows[Row.TEACHER_ENTROPY],
        "top1_agree": rows[Row.TOP1_AGREE],
    }


def coefficients(
    gradients: Mapping[str, Tensor], rows: Tensor, *, jsd_complement: Tensor
) -> Coefficients:
    """Turns d loss / d statistic into the coordinates of dL/dz: the table above, line by line.

    Args:
        gradients: name -> (C,) d loss / d statistic; a name that is missing contributes nothing.
        rows: (len(Row), C) the statistics themselves.
        jsd_complement: () the weight 1 - b of the student in the jsd mixture.
    """
    zero = torch.zeros_like(rows[0])

    def gradient(name: str) -> Tensor:
        return gradients.get(name, zero)

    def centre(gradient: Tensor, mean: Tensor) -> Tensor:
        # A statistic that was not computed is NaN; without a gradient it must not spread.
        return torch.where(gradient == 0, zero, gradient * mean)

    mixture = jsd_complement * gradient("jsd")
    return Coefficients(
        p=gradient("lse")
        - centre(gradient("entropy"), rows[Row.ENTROPY])
        - centre(gradient("reverse_kl"), rows[Row.REVERSE_RESIDUAL])
        - centre(mixture, rows[Row.MIXTURE_RESIDUAL])
        - centre(gradient("ref_kl"), rows[Row.REFERENCE_RESIDUAL]),
        log_p=-gradient("entropy"),
        teacher=gradient("reverse_kl"),
        reference=gradient("ref_kl"),
        mixture=mixture,
        difference=gradient("forward_kl"),
        target=gradient("logprob"),
    )
