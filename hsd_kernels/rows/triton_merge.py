"""The parts of a row as one part, in Triton: the formulas of `partials.merge`, in one launch.

A program has all tiles of a few rows in registers, so that sums over tiles have one fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsd_kernels.rows import triton_math as math
from hsd_kernels.rows.mixture import EXPONENT_LIMIT
from hsd_kernels.rows.partials import LARGEST_ANCHORED, Partial
from hsd_kernels.rows.triton_tile import COUNTS

_PARTIALS = tl.constexpr(len(Partial))
_Z, _U = tl.constexpr(int(Partial.MAX)), tl.constexpr(int(Partial.TEACHER_MAX))
_W = tl.constexpr(int(Partial.REFERENCE_MAX))
_TARGET, _TEACHER_TARGET = (
    tl.constexpr(int(Partial.TARGET)),
    tl.constexpr(int(Partial.TEACHER_TARGET)),
)
_FORWARD = tl.constexpr(int(Partial.FORWARD_ANCHOR))
_REVERSE = tl.constexpr(int(Partial.REVERSE_ANCHOR))
_REFERENCE = tl.constexpr(int(Partial.REFERENCE_ANCHOR))
_LIMIT, _ANCHORED = tl.constexpr(EXPONENT_LIMIT), tl.constexpr(LARGEST_ANCHORED)
_INFINITY = tl.constexpr(float("inf"))
_NOWHERE = tl.constexpr(-1e30)  # exp of it, and of its sum with any logit, is 0


@triton.jit
def _line(parts, rows, here, LINE: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """A line of the parts, (tiles, rows), and `OTHER` outside."""
    return tl.load(parts + LINE * rows, mask=here, other=OTHER)


@triton.jit
def _maximum_and_sum(parts, rows, here, LINE: tl.constexpr):
    """Outside, finite numbers of no weight."""
    return _line(parts, rows, here, LINE, _NOWHERE), _line(parts, rows, here, LINE + 1, 1.0)


@triton.jit
def _side(parts, whole, rows, here, tile, valid, LINE: tl.constexpr, MEAN: tl.constexpr):
    """Merges one side's logits; its parts' shifts, log-weights, and which has the likely token."""
    maximum, sums = _maximum_and_sum(parts, rows, here, LINE)
    largest = tl.max(maximum, axis=0)
    shift = maximum - largest[None, :]
    total = tl.sum(tl.exp(shift) * sums, axis=0)
    log_weight = shift + tl.log(sums / total[None, :])
    first = tl.min(tl.where(maximum == largest[None, :], tile, tile + (1 << 20)), axis=0)
    winner = tile == first[None, :]
    tl.store(whole + LINE * rows, largest, mask=valid)
    tl.store(whole + (LINE + 1) * rows, total, mask=valid)
    if MEAN:
        means = _line(parts, rows, here, LINE + 2) + shift
        mean = tl.sum(tl.exp(log_weight) * means, axis=0)
        tops = _line(parts, rows, here, LINE + 3)
        tl.store(whole + (LINE + 2) * rows, mean, mask=valid)
        tl.store(whole + (LINE + 3) * rows, tl.sum(tl.where(winner, tops, 0.0), axis=0), mask=valid)
    return shift, log_weight, winner


@triton.jit
def _target(parts, whole, rows, here, valid, LINE: tl.constexpr):
    logits = _line(parts, rows, here, LINE, -_INFINITY)
    tl.store(whole + LINE * rows, tl.max(logits, axis=0), mask=valid)


@triton.jit
def _pair(
    parts, whole, rows, here, valid, shift, log_weight, winner,
    BASE: tl.constexpr, OTHER: tl.constexpr, LINE: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Lines ANCHOR, MEAN and EXCESS of a pair: `partials._merge_pair`."""
    anchors, own_mean = _line(parts, rows, here, LINE), _line(parts, rows, here, LINE + 1)
    anchor = tl.sum(tl.where(winner, anchors, 0.0), axis=0)
    step = anchors - anchor[None, :]
    if not KNOWN:
        step -= shift
    weight = tl.exp(log_weight)
    mean = tl.sum(weight * (own_mean + step), axis=0)
    height = tl.where(here, own_mean + step - mean[None, :], 0.0)
    near = tl.exp(log_weight + height) * _line(parts, rows, here, LINE + 2)
    near += math.excess(weight, log_weight, height)
    base_max, base_sum = _maximum_and_sum(parts, rows, here, BASE)
    other_max, other_sum = _maximum_and_sum(parts, rows, here, OTHER)
    ratio = (other_max - base_max) - anchors if KNOWN else other_max - anchors
    ratio += tl.log(other_sum) - tl.log(base_sum)
    far = tl.exp(tl.minimum(log_weight + ratio + step - mean[None, :], _LIMIT))
    far -= weight * (1.0 + height)
    chosen = tl.where(ratio - own_mean < _ANCHORED, near, far)
    tl.store(whole + LINE * rows, anchor, mask=valid)
    tl.store(whole + (LINE + 1) * rows, mean, mask=valid)
    tl.store(whole + (LINE + 2) * rows, tl.sum(chosen, axis=0), mask=valid)


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    parts, whole, rows, tiles,
    SPEC: tl.constexpr, KNOWN: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """whole (len(Partial), rows) of parts (tiles <= TILES, len(Partial), rows)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.arange(0, TILES)[:, None]
    valid = row < rows
    here = (tile < tiles) & valid[None, :]
    parts += tile.to(tl.int64) * _PARTIALS * rows + row[None, :]
    whole += row
    z_shift, z_share, z_winner = _side(parts, whole, rows, here, tile, valid, _Z, True)
    if SPEC.target:
        _target(parts, whole, rows, here, valid, _TARGET)
    if SPEC.teacher != "absent":
        u_shift, u_share, u_winner = _side(parts, whole, rows, here, tile, valid, _U, True)
        if SPEC.target:
            _target(parts, whole, rows, here, valid, _TEACHER_TARGET)
        if SPEC.forward_kl or SPEC.jsd:
            _pair(
                parts, whole, rows, here, valid, u_shift, u_share, u_winner,
                _U, _Z, _FORWARD, KNOWN.teacher,
            )  # fmt: skip
        if SPEC.reverse_kl or SPEC.jsd:
            _pair(
                parts, whole, rows, here, valid, z_shift, z_share, z_winner,
                _Z, _U, _REVERSE, KNOWN.teacher,
            )  # fmt: skip
    if SPEC.reference != "absent":
        _side(parts, whole, rows, here, tile, valid, _W, False)
        _pair(
            parts, whole, rows, here, valid, z_shift, z_share, z_winner,
            _Z, _W, _REFERENCE, KNOWN.reference,
        )  # fmt: skip
