"""Logits held in bf16 without its errors: differences, centres, and columns refined to fp32.

What a chunk holds in bf16 are the student's logits less a number per row, x_s W^T - a, and the
differences to the others less one, (x_s - x_t) W^T - b, or [x_s, -x_t] [W, U]^T - b for a side with
a head U of its own. No divergence depends on a and b, but what rounding does to the numbers: it is
relative to them. With a near the logits of the tokens that carry mass, and b near their
differences, it is smallest where it counts. `addmm` starts its fp32 sums at -a, so that nothing is
rounded before.

What is left is mostly the error of columns that are likely in some row. Where the backend has the
kernels for it, these are refined beforehand, and the error of the rest is read from some of the
rows. Elsewhere, and where that does not do, the error of the gradient and of the KLs is estimated
column by column (`row_errors`), and where it exceeds `TOLERANCE`, the columns with the largest
share are refined: computed again in fp32, their parts of the statistics merged with those of the
rest, and their columns of the gradient formed from the fp32 values. A chunk that needs more than
`LARGEST_SHARE` of its columns is computed with fp32 logits.

Where no gradient is wanted, the error is that of the statistics. Where it exceeds `TOLERANCE` the
chunk is computed with fp32 logits: to learn which columns to refine would cost as much.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.centred import Block, Chunk, centred_logits, refined
from hsd_kernels.differentiation import token_loss
from hsd_kernels.passes import Formed, Group, chunk_passes, merged_statistics, row_inputs
from hsd_kernels.plan import LARGEST_SHARE
from hsd_kernels.problem import Problem
from hsd_kernels.row_sample import row_sample, sample_size
from hsd_kernels.rows import CheckedKernels, RowInputs, RowKernels, RowSpec
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import Partial, finish, merge
from hsd_kernels.rows.torch_logits import block_size, of_rows
from hsd_kernels.statistics import Coefficients, coefficients
from hsd_kernels.workspace import Heads

TOLERANCE = 0.005  # expected relative error of a chunk that needs no refinement
LIKELY_SHARE = 1 / 64  # of the columns, that may be refined before an error is known


def formed(
    problem: Problem,
    kernels: RowKernels,
    group: Group,
    rows: Tensor,
    *,
    heads: Heads,
    buffers: Tensor,
    differentiate: bool,
) -> Formed | None:
    """Loss, statistics and logit gradient of a chunk; None where it needs fp32 logits.

    Waits for the device once, for the number of columns to refine.

    Args:
        rows: (C,) int64 of the problem's tokens.
        heads: bf16.
        buffers: (at least S C, V) bf16; the gradient takes the place of the student's logits.
        differentiate: whether a gradient is formed; without one, only where the backend has
            `CheckedKernels`.
    """
    given = _Given(problem, kernels, group, rows, heads, differentiate)
    if kernels.checked is not None:
        found = _likely_refined(given, kernels.checked, buffers)
        if found is not None or not differentiate:
            return found
    return _refined_as_estimated(given, buffers)


class _Given(NamedTuple):
    """What `formed` was given."""

    problem: Problem
    kernels: RowKernels
    group: Group
    rows: Tensor  # (C,) int64
    heads: Heads
    differentiate: bool


class _Evaluated(NamedTuple):
    """What the statistics of a chunk come to."""

    values: Tensor  # (len(Row), C)
    named: dict[str, Tensor]  # statistics by name, (C,)
    loss: Tensor  # ()
    along: Coefficients

    def formed(self, gradient: Tensor | None, mass: Tensor | None, refined: int) -> Formed:
        return Formed(
            loss=self.loss, statistics=self.named, gradient=gradient, mass=mass, refined=refined
        )


def _likely_refined(given: _Given, kernels: CheckedKernels, buffers: Tensor) -> Formed | None:
    """The chunk with its likeliest columns in fp32; None where that leaves too large an error.

    What rounding does is mostly done to the few columns that are likely in many rows. With these
    refined beforehand a chunk is read once for its statistics and once for its gradient, and some
    of it for the error of either.
    """
    spec, chunk, x = _read(given, buffers)
    columns = _likely_columns(kernels.likely(spec, x), x.student.shape[1])
    blocks = [Block(x, None)]
    if len(columns):
        blocks = refined(given.problem, chunk, x, columns)
    found = _evaluated(given, spec, blocks, chunk)
    error = _gradient_error if given.differentiate else _statistics_error
    if error(kernels, spec, blocks, found) > TOLERANCE:
        return None
    return _with_gradient(given, spec, blocks, found, len(columns))


def _with_gradient(
    given: _Given, spec: RowSpec, blocks: list[Block], found: _Evaluated, refined: int
) -> Formed:
    """What was found, and the gradient in the place of the logits where one is wanted."""
    if not given.differentiate:
        return found.formed(None, None, refined)
    mass = torch.zeros_like(found.loss).expand(len(given.rows))
    for block in blocks:
        mass = mass + given.kernels.grad(spec, block.x, found.values, found.along, block.x.student)
    return found.formed(_whole(blocks), mass, refined)


def _gradient_error(
    kernels: CheckedKernels, spec: RowSpec, blocks: list[Block], found: _Evaluated
) -> float:
    """What gradient and KLs of a chunk are expected to be off by, relative, read from a sample."""
    x = blocks[0].x
    sample = row_sample(found.values, found.along, x.inverse_temperature)
    pieces = math.ceil(len(sample.rows) / block_size(x))  # copies of rows: few at a time
    errors = torch.zeros(3, dtype=torch.float64)
    for rows, weights in zip(*(torch.tensor_split(s, pieces) for s in sample), strict=True):
        values, along = found.values[:, rows], Coefficients(*(c[rows] for c in found.along))
        for block in blocks:
            squares = kernels.gradient_errors(spec, of_rows(block.x, rows), values, along)
            errors += squares.double() @ weights
    return _squared_error(errors, found.values.shape[1]).sqrt().item()


def _statistics_error(
    kernels: CheckedKernels, spec: RowSpec, blocks: list[Block], found: _Evaluated
) -> float:
    """Root mean square of what the statistics of some of the rows are expected to be off by."""
    values = found.values  # (len(Row), C)
    sampled = slice(None, None, values.shape[1] // sample_size(values.shape[1]))
    squares = [
        kernels.statistics_errors(spec, of_rows(block.x, sampled), values[:, sampled])
        for block in blocks
    ]
    return torch.stack(squares).sum(0).mean(dtype=torch.float64).sqrt().item()


def _likely_columns(likely: Tensor, columns: int) -> Tensor:
    """Those that are likely in any row, or in most rows where they are too many, (K,) int64.

    Args:
        likely: (C, n) int64 the likeliest of each row.
        columns: V.
    """
    found, rows = torch.unique(likely, return_counts=True)
    most = math.ceil(LIKELY_SHARE * columns)
    if len(found) > most:
        found = found[rows.topk(most).indices].sort().values
    chosen: Tensor = found
    return chosen


def _refined_as_estimated(given: _Given, buffers: Tensor) -> Formed | None:
    """The chunk with the columns in fp32 that its error, column by column, asks for."""
    spec, chunk, x = _read(given, buffers)
    blocks = [Block(x, None)]
    found = _evaluated(given, spec, blocks, chunk)
    errors = given.kernels.errors(spec, x, found.values, found.along)
    columns = _columns_to_refine(errors, rows=len(given.rows))
    if columns is None:
        return None
    if len(columns):
        blocks = refined(given.problem, chunk, x, columns)
        found = _evaluated(given, spec, blocks, chunk)
    return _with_gradient(given, spec, blocks, found, len(columns))


def _whole(blocks: list[Block]) -> Tensor:
    """(C, V) gradient, of the blocks' in their students' place."""
    gradient = blocks[0].x.student
    for block in blocks:
        if block.columns is not None:
            gradient.index_copy_(1, block.columns, block.x.student.to(gradient.dtype))
    return gradient


def _read(given: _Given, buffers: Tensor) -> tuple[RowSpec, Chunk, RowInputs]:
    (reading,) = chunk_passes(given.problem, given.group)
    chunk = centred_logits(given.problem, given.group, given.rows, given.heads, buffers)
    x = row_inputs(given.problem, reading, given.rows, chunk.logits, chunk.targets)
    return reading.spec, chunk, x


def _evaluated(given: _Given, spec: RowSpec, blocks: list[Block], chunk: Chunk) -> _Evaluated:
    x = blocks[0].x
    values = _statistics(given.kernels, spec, blocks, chunk)
    named = merged_statistics([values])
    shift = chunk.centres * (x.logit_scale * x.inverse_temperature)
    named["lse"] = named["lse"] + shift[0]
    if given.group.teacher is not None:
        named["teacher_lse"] = named["teacher_lse"] + (shift[0] - shift[1])
    loss, gradients = token_loss(
        given.problem, named, given.rows, differentiate=given.differentiate
    )
    along = coefficients(gradients, values, jsd_complement=x.jsd_complement)
    return _Evaluated(values, named, loss, along)


def _statistics(kernels: RowKernels, spec: RowSpec, blocks: list[Block], chunk: Chunk) -> Tensor:
    """(len(Row), C) of the rows that the blocks make up."""
    x = blocks[0].x
    parts = []
    for block in blocks:
        found = kernels.partials(spec, block.x)
        if block.columns is not None:
            tops = [Partial.TOP, *([Partial.TEACHER_TOP] if block.x.teacher is not None else [])]
            for top in tops:
                found[:, top] = block.columns[found[:, top].long()].to(found.dtype)
        parts.append(found)
    whole = merge(spec, torch.cat(parts))
    if chunk.at_targets is not None:
        logits = chunk.at_targets * (x.logit_scale * x.inverse_temperature)
        whole[Partial.TARGET] = logits[0]
        if spec.teacher != "absent":
            whole[Partial.TEACHER_TARGET] = logits[0] - logits[1]
    rows = finish(spec, whole, x)
    if not spec.jsd:
        return rows
    sums = torch.cat([kernels.mixture(spec, block.x, rows) for block in blocks])
    return finish_mixture(rows, sums, x)


def _columns_to_refine(errors: Tensor, *, rows: int) -> Tensor | None:
    """The fewest columns without which the expected error is tolerable, (K,) int64 ascending.

    None where fp32 logits are the better choice.

    Args:
        errors: (3, V) what `row_errors` returned.
        rows: C, over whose KLs the mean is taken.
    """
    error = _squared_error(errors.double(), rows)
    largest, order = error.sort(descending=True, stable=True)
    left = largest.flip(0).cumsum(0).flip(0)  # of these columns and all that matter less
    count = int((left > TOLERANCE**2).sum())
    if count > math.ceil(LARGEST_SHARE * len(error)):
        return None
    columns: Tensor = order[:count].sort().values
    return columns


def _squared_error(errors: Tensor, rows: int) -> Tensor:
    """(...) of sums (3, ...) as `row_errors` has them: relative, of the gradient and of the KLs."""
    gradient, size, values = errors
    size_of_all = size.sum()
    # Nothing is to be refined for a gradient that is zero.
    squared: Tensor = torch.where(size_of_all > 0, gradient / size_of_all, 0) + values / rows
    return squared
