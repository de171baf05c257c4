"""The row kernels and the contract they share.

    row_partials(spec, x)               -> (S, len(Partial), C)  reads the chunk; S parts of a row
    row_mixture(spec, x, rows)          -> (S, 3, C)             reads it again; jsd only
    row_grad(spec, x, rows, c, out)     -> (C,)                  writes dL/d(raw logits) to `out`
    row_errors(spec, x, rows, c)        -> (3, V)                how far rounding moves the columns

Between them, on (C,) vectors: `partials.merge` and `partials.finish` make statistics (len(Row), C)
of parts, `mixture.finish_mixture` adds jsd. Raw logits are the GEMM's output `x W^T + bias`; scale,
softcap and temperature are applied in the kernels, and their chain rule in `row_grad`. A second
model's row comes as its own raw logits or, where it shares the student's head, as the difference
student - other, computed as one GEMM (x_student - x_other) W^T: its relative error does not grow
with the size of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Source = Literal["absent", "logits", "difference"]


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """What a row holds and what is wanted of it: everything that selects code, no values.

    `same_temperature` says that teacher and student share the temperature of this pass, so that
    the difference of their logits is the given difference times one factor.
    """

    teacher: Source = "absent"
    reference: Source = "absent"
    forward_kl: bool = False
    reverse_kl: bool = False
    jsd: bool = False
    target: bool = False
    softcap: bool = False
    same_temperature: bool = True


class RowInputs(NamedTuple):
    """One chunk of rows. Optional tensors are None exactly where the `RowSpec` says absent."""

    student: Tensor  # (C, V) raw logits
    teacher: Tensor | None  # (C, V) raw logits, or raw student - teacher
    reference: Tensor | None  # (C, V) likewise
    targets: Tensor | None  # (C,) int64; below 0: in another part of the row
    inverse_temperature: Tensor  # (C,)
    teacher_inverse_temperature: Tensor  # (C,)
    logit_scale: Tensor  # ()
    softcap: Tensor  # ()
    jsd_beta: Tensor  # ()
    jsd_complement: Tensor  # () 1 - beta, rounded once: near beta 1 fp32 cannot form it


def known_difference(spec: RowSpec, source: Source, *, of_teacher: bool) -> bool:
    """Whether the difference of the two sides' logits is the given difference times a factor."""
    return source == "difference" and not spec.softcap and (spec.same_temperature or not of_teacher)


class CheckedKernels(NamedTuple):
    """What a chunk of bf16 logits takes that is refined before its error is known.

    Both errors are read from some of the rows: `gradient_errors(spec, x, rows, c)` are the sums of
    `row_errors` over columns instead of rows, `statistics_errors(spec, x, rows)` is for where no
    gradient is formed.
    """

    likely: Callable[[RowSpec, RowInputs], Tensor]  # (C, n) int64 the likeliest columns of each row
    gradient_errors: Callable[..., Tensor]  # (3, C) expected squares, and the gradient's
    statistics_errors: Callable[[RowSpec, RowInputs, Tensor], Tensor]  # (C,) expected squares


class RowKernels(NamedTuple):
    """A backend's kernels, by the signatures of the module docstring."""

    partials: Callable[..., Tensor]
    mixture: Callable[..., Tensor]
    grad: Callable[..., Tensor]
    errors: Callable[..., Tensor]
    checked: CheckedKernels | None
    masses: Callable[[Tensor], tuple[Tensor, Tensor]]  # of a gradient (C, V): L1 norms of its
    # columns (V,) and rows (C,)
    stats: Callable[[RowSpec, RowInputs], Tensor]  # (len(Row), C) of whole rows
