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

so that dL/dz of any loss is the sum of the last column, each line times d loss / d statistic:
seven scalars per token, `Coefficients`. The brackets are formed as *differences* from the most
likely token, never as log p minus a mean: near the student, and where one token has nearly all of
the mass, the separate terms cancel to a few per mille of their size. With k the most likely token
of the distribution that weighs the sum,

    log p + H          = (z - z_k) - E_p[z - z_k]
    log p - log q - L  = E_p[e] - e,    e = (u - u_k) - (z - z_k),   and the like for r
    log p - log m - KL = v - E_p[v],    v = log p/m - (log p/m)_k
    p - q              = -p expm1(log q/p), or q expm1(log p/q), whichever has the smaller exponent
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final, NamedTuple

import torch
from torch import Tensor


class Row(IntEnum):
    """The layout of finished statistics: fp32, shape (len(Row), C), one line per statistic.

    What was not asked for is NaN. `*_ANCHOR`, `*_MEAN` and FORWARD_LOG_RATIO are what `row_grad`
    needs to form the brackets of the module docstring; see `hsd_kernels.rows.partials`.
    """

    MAX = 0  # max z
    LOG_SUM = 1  # lse - max
    LOGIT_MEAN = 2  # E_p[z - max]
    LOGPROB = 3
    ENTROPY = 4
    TEACHER_MAX = 5
    TEACHER_LOG_SUM = 6
    TEACHER_LOGPROB = 7
    TEACHER_ENTROPY = 8
    TOP1_AGREE = 9  # 1 where student and teacher share their most likely token
    FORWARD_KL = 10
    FORWARD_ANCHOR = 11  # at the teacher's most likely token
    FORWARD_LOG_RATIO = 12  # log E_q[exp e], so that log p/q = e - FORWARD_LOG_RATIO
    REVERSE_KL = 13
    REVERSE_ANCHOR = 14  # at the student's most likely token
    REVERSE_MEAN = 15  # E_p[e]
    JSD = 16
    MIXTURE_ANCHOR = 17  # log p/m at the student's most likely token
    MIXTURE_MEAN = 18  # E_p[v]
    REF_KL = 19
    REFERENCE_ANCHOR = 20
    REFERENCE_MEAN = 21


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

STATISTICS: Final = (
    *DIFFERENTIABLE,
    "teacher_lse",
    "teacher_logprob",
    "teacher_entropy",
    "top1_agree",
)
"""All of them, those of the teacher are constants."""

DIVERGENCES: Final = ("forward_kl", "reverse_kl", "jsd")


class Coefficients(NamedTuple):
    """Coordinates of dL/dz: the factor of each line of the table; each fp32 of shape (C,)."""

    lse: Tensor
    logprob: Tensor
    entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    jsd: Tensor  # of p (v - E_p[v]): d loss / d jsd times 1 - b
    ref_kl: Tensor


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
    """Turns d loss / d statistic into the coordinates of dL/dz.

    Args:
        gradients: name -> (C,) d loss / d statistic; a name that is missing contributes nothing.
        rows: (len(Row), C) the statistics themselves.
        jsd_complement: () the weight 1 - b of the student in the jsd mixture.
    """
    zero = torch.zeros_like(rows[0])
    named = {name: gradients.get(name, zero) for name in DIFFERENTIABLE}
    return Coefficients(**{**named, "jsd": jsd_complement * named["jsd"]})
