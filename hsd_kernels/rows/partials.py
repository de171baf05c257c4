"""Statistics of a part of a row's columns, how parts merge, and the statistics of the whole row.

A part is what one program of a split row, or one rank of a sharded vocabulary, has seen. Every mean
is relative to the part's own most likely token, so that nothing overflows and what is small keeps
its digits; `merge` moves them to the whole row's. Each KL and each reverse-type gradient comes from
one pair of means. For a distribution x (the base, which weighs them) and another y, with k the most
likely token of x and e = (y - y_k) - (x - x_k), of logits:

    mean   = E_x[e]
    excess = E_x[exp(e - mean) - 1 - (e - mean)]        every term >= 0

    KL(x || y)      = log E_x[exp e] - E_x[e] = log1p(excess)
    log E_x[exp e]  = mean + log1p(excess)

Nothing of the size of |e| cancels against a KL of the size of e^2. Parts merge as variances do:
with weights pi of the parts and h = mean_i - mean, excess = sum pi (exp(h) excess_i + exp(h) - 1 -
h). Where y puts its mass on tokens that x hardly knows the excess would overflow; there log E_x[exp
e] = lse_y - y_k - log sum exp(x - x_k), which cancels nothing.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec, known_difference
from hsd_kernels.rows.mixture import EXPONENT_LIMIT, SERIES_RADIUS, mixture_anchor, remainder
from hsd_kernels.statistics import Row


class Partial(IntEnum):
    """The layout of a part's statistics: fp32, shape (len(Partial), C), one line each.

    A part without columns has maximum -inf and sum 0, and the rest may be anything, as may what was
    not asked for. An anchor is y_k, or (y - x)_k where the difference itself is what is known.
    """

    MAX = 0
    SUM = 1  # sum exp(z - max)
    MEAN = 2  # E_p[z - max]
    TOP = 3  # column of the maximum, the lowest if it is there twice
    TARGET = 4  # z of the target, -inf where it is not in this part
    TEACHER_MAX = 5
    TEACHER_SUM = 6
    TEACHER_MEAN = 7
    TEACHER_TOP = 8
    TEACHER_TARGET = 9
    FORWARD_ANCHOR = 10  # base teacher, other student
    FORWARD_MEAN = 11
    FORWARD_EXCESS = 12
    REVERSE_ANCHOR = 13  # base student, other teacher
    REVERSE_MEAN = 14
    REVERSE_EXCESS = 15
    REFERENCE_MAX = 16
    REFERENCE_SUM = 17
    REFERENCE_ANCHOR = 18  # base student, other reference
    REFERENCE_MEAN = 19
    REFERENCE_EXCESS = 20


class Pair(NamedTuple):
    """Lines of a pair of distributions: the base's and the other's, and their sums."""

    base: Partial  # its maximum; the sum follows it
    other: Partial
    anchor: Partial  # the mean and the excess follow it


_FORWARD: Final = Pair(Partial.TEACHER_MAX, Partial.MAX, Partial.FORWARD_ANCHOR)
_REVERSE: Final = Pair(Partial.MAX, Partial.TEACHER_MAX, Partial.REVERSE_ANCHOR)
_REFERENCE: Final = Pair(Partial.MAX, Partial.REFERENCE_MAX, Partial.REFERENCE_ANCHOR)

LARGEST_ANCHORED: Final = 20.0  # nats of KL: above, the excess may overflow


def excess(shift: Tensor, e: Tensor) -> Tensor:
    """exp(shift) (exp(e) - 1 - e) for shift <= 0: near zero by its series, else without overflow.

    Correct to a few ulp of the dtype for |e| up to the series' radius, and to rounding of
    exp(shift) (1 + |e|) beyond; 0 at shift -inf.
    """
    weight = shift.exp()
    far = (shift + e).clamp(max=EXPONENT_LIMIT).exp() - weight * (1 + e)
    return torch.where(e.abs() < SERIES_RADIUS, weight * remainder(e), far)


def empty_part(like: Tensor) -> Tensor:
    """What a part without columns has seen of (C,) rows, (len(Partial), C)."""
    part = torch.zeros((len(Partial), len(like)), dtype=like.dtype, device=like.device)
    for line in (Partial.MAX, Partial.TEACHER_MAX, Partial.REFERENCE_MAX):
        part[line] = -torch.inf
    part[Partial.TARGET] = part[Partial.TEACHER_TARGET] = -torch.inf
    return part


def merge(spec: RowSpec, parts: Tensor) -> Tensor:
    """Parts in the order of their columns, (S, len(Partial), C), as one part (len(Partial), C).

    The same parts give the same bits, however they were distributed over programs or ranks.
    """
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].clone()
    means = {Partial.MAX: Partial.MEAN, Partial.TEACHER_MAX: Partial.TEACHER_MEAN}
    sides = [Partial.MAX]
    if spec.teacher != "absent":
        sides.append(Partial.TEACHER_MAX)
    if spec.reference != "absent":
        sides.append(Partial.REFERENCE_MAX)
    shares = {}
    for side in sides:
        share = shares[side] = _merge_side(parts, whole, side)
        if side in means:
            mean = means[side]
            whole[mean] = share.mean(parts[:, mean] + share.shift)
            whole[mean + 1] = share.of_top(parts[:, mean + 1])
    for target in (Partial.TARGET, Partial.TEACHER_TARGET):
        whole[target] = parts[:, target].amax(0)
    for pair, known in pairs(spec):
        _merge_pair(parts, whole, pair, known, shares[pair.base])
    return whole


class _Share(NamedTuple):
    """How much of a distribution each part holds, (S, C) each; the empty ones hold nothing."""

    shift: Tensor  # the part's maximum less the row's
    log_weight: Tensor  # of the part's share of the mass
    winner: Tensor  # (1, C) the part that holds the row's most likely token

    def mean(self, values: Tensor) -> Tensor:
        """(C,) of the parts' values (S, C)."""
        values = torch.where(self.log_weight == -torch.inf, 0.0, values)
        return (self.log_weight.exp() * values).sum(0)

    def of_top(self, values: Tensor) -> Tensor:
        """(C,) the value of the part with the row's most likely token."""
        return values.gather(0, self.winner)[0]


def _merge_side(parts: Tensor, whole: Tensor, side: Partial) -> _Share:
    """Merges maximum and sum of one side's logits."""
    maximum, sums = parts[:, side], parts[:, side + 1]  # (S, C)
    whole[side] = maximum.amax(0)
    shift = maximum - whole[side]
    whole[side + 1] = (shift.exp() * sums).sum(0)
    log_weight = shift + (sums / whole[side + 1]).log()
    return _Share(shift, log_weight, maximum.argmax(0, keepdim=True))


def pairs(spec: RowSpec) -> list[tuple[Pair, bool]]:
    """The pairs of a specification, and whether their anchor is that of a known difference."""
    found = []
    if spec.teacher != "absent":
        known = known_difference(spec, spec.teacher, of_teacher=True)
        if spec.forward_kl or spec.jsd:
            found.append((_FORWARD, known))
        if spec.reverse_kl or spec.jsd:
            found.append((_REVERSE, known))
    if spec.reference != "absent":
        known = known_difference(spec, spec.reference, of_teacher=False)
        found.append((_REFERENCE, known))
    return found


def _merge_pair(parts: Tensor, whole: Tensor, pair: Pair, known: bool, share: _Share) -> None:
    """Moves each part's mean and excess from its own most likely token to the whole row's."""
    anchor, own_mean, own_excess = (parts[:, pair.anchor + i] for i in range(3))  # (S, C)
    whole[pair.anchor] = share.of_top(anchor)
    step = anchor - whole[pair.anchor]
    if not known:
        step = step - share.shift  # of y - x, as is that of a known difference
    moved = own_mean + step
    mean = whole[pair.anchor + 1] = share.mean(moved)
    height = torch.where(share.log_weight == -torch.inf, 0.0, moved - mean)
    near = (share.log_weight + height).exp() * own_excess + excess(share.log_weight, height)
    ratio = _far_log_ratio(parts, pair, known)
    far_mass = (share.log_weight + ratio + step - mean).clamp(max=EXPONENT_LIMIT).exp()
    far = far_mass - share.log_weight.exp() * (1 + height)
    chosen = torch.where(ratio - own_mean < LARGEST_ANCHORED, near, far)
    empty = share.log_weight == -torch.inf
    whole[pair.anchor + 2] = torch.where(empty, 0.0, chosen).sum(0)


def _far_log_ratio(part: Tensor, pair: Pair, known: bool) -> Tensor:
    """log E_x[exp e] as the difference of two logsumexps, of (..., len(Partial), C)."""
    base_max, base_sum = part[..., pair.base, :], part[..., pair.base + 1, :]
    other_max, other_sum = part[..., pair.other, :], part[..., pair.other + 1, :]
    anchor = part[..., pair.anchor, :]
    height = (other_max - base_max) - anchor if known else other_max - anchor
    return height + (other_sum.log() - base_sum.log())


def _pair_statistics(part: Tensor, pair: Pair, known: bool) -> tuple[Tensor, Tensor, Tensor]:
    """KL(x || y), log E_x[exp e] and E_x[e], (C,) each."""
    mean, near = part[pair.anchor + 1], torch.log1p(part[pair.anchor + 2])
    far = _far_log_ratio(part, pair, known) - mean
    kl = torch.where(far < LARGEST_ANCHORED, near, far)
    return kl, mean + kl, mean


def finish(spec: RowSpec, part: Tensor, x: RowInputs) -> Tensor:
    """The statistics (len(Row), C) of a whole row from its one part (len(Partial), C).

    JSD and MIXTURE_MEAN stay NaN: they need a second reading, see `hsd_kernels.rows.mixture`.
    """
    rows: dict[Row, Tensor] = {}

    def side(first: Partial, maximum: Row, log_sum: Row) -> Tensor:
        rows[maximum], rows[log_sum] = part[first], part[first + 1].log()
        return part[first + 2]

    rows[Row.LOGIT_MEAN] = side(Partial.MAX, Row.MAX, Row.LOG_SUM)
    rows[Row.ENTROPY] = rows[Row.LOG_SUM] - rows[Row.LOGIT_MEAN]
    if spec.target:
        rows[Row.LOGPROB] = (part[Partial.TARGET] - rows[Row.MAX]) - rows[Row.LOG_SUM]
    if spec.teacher != "absent":
        mean = side(Partial.TEACHER_MAX, Row.TEACHER_MAX, Row.TEACHER_LOG_SUM)
        rows[Row.TEACHER_ENTROPY] = rows[Row.TEACHER_LOG_SUM] - mean
        agree = part[Partial.TOP] == part[Partial.TEACHER_TOP]
        rows[Row.TOP1_AGREE] = agree.to(part.dtype)
        if spec.target:
            shifted = part[Partial.TEACHER_TARGET] - rows[Row.TEACHER_MAX]
            rows[Row.TEACHER_LOGPROB] = shifted - rows[Row.TEACHER_LOG_SUM]
    for pair, known in pairs(spec):
        kl, log_ratio, mean = _pair_statistics(part, pair, known)
        if pair is _FORWARD:
            rows[Row.FORWARD_KL], rows[Row.FORWARD_LOG_RATIO] = kl, log_ratio
            rows[Row.FORWARD_ANCHOR] = part[pair.anchor]
        elif pair is _REVERSE:
            rows[Row.REVERSE_KL], rows[Row.REVERSE_MEAN] = kl, mean
            rows[Row.REVERSE_ANCHOR] = part[pair.anchor]
        else:
            rows[Row.REF_KL], rows[Row.REFERENCE_MEAN] = kl, mean
            rows[Row.REFERENCE_ANCHOR] = part[pair.anchor]
    if spec.jsd:
        rows[Row.MIXTURE_ANCHOR] = mixture_anchor(spec, rows, x)
    absent = torch.full_like(part[Partial.MAX], torch.nan)
    return torch.stack([rows.get(name, absent) for name in Row])
