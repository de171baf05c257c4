"""Losses of one's own: a function of the statistics in one pass, or the statistics themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hsd_kernels.arguments import (
    available_statistics,
    compute_dtype_of,
    per_token_inputs,
    problem,
)
from hsd_kernels.checks import hidden_states, own_input
from hsd_kernels.loss import BackendChoice, PrecisionChoice, run
from hsd_kernels.ops import statistics_of
from hsd_kernels.options import LossChoice, check_needs, checked_divergence
from hsd_kernels.outputs import LossOutput
from hsd_kernels.problem import Problem
from hsd_kernels.reference import check_dense, dense_statistics
from hsd_kernels.statistics import DIFFERENTIABLE, STATISTICS
from hsd_kernels.token_losses import (
    LINEAR_LOSS,
    TokenLoss,
    find_token_loss,
    statistics_read,
    token_loss_key,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STATISTICS_OF_ALL = ("lse", "entropy")  # that every call has


def fused_token_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    *,
    token_loss: TokenLoss | str,
    token_inputs: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    jsd_beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    kl_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    precision: PrecisionChoice = "auto",
    sparse_tolerance: float | None = None,
    sparse_max_columns: int | None = None,
    top_k: int = 0,
    weight_grad_out: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: BackendChoice = "auto",
) -> LossOutput:
    """The sum over tokens of token_weights * token_loss(statistics, inputs), in one pass.

    Costs what `fused_hsd_loss` costs. The loss is elementwise over tokens: it is given chunks of
    them, and differentiated by the statistics it reads.

    Args:
        token_loss: a function (statistics, inputs) -> (C,) of two mappings name -> (C,), or the
            name of one that `register_token_loss` registered. Statistics, in nats: lse, entropy;
            logprob with `targets`; forward_kl, reverse_kl, jsd and, as constants, teacher_lse,
            teacher_entropy, top1_agree (and teacher_logprob with `targets`) with a teacher; ref_kl
            with a reference. It is called once on two made-up tokens to see which it reads.
        token_inputs: name -> (...,) vectors that the loss reads beside them, detached.
        token_weights: (...,) default 1/N. A row of weight 0 enters no GEMM.
        jsd_beta: the teacher's share of the mixture, between 0 and 1.

    The other arguments are those of `fused_hsd_loss`.

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected.
    """
    arguments = dict(locals())
    check_needs(arguments)
    student = hidden_states("student_hidden", student_hidden)
    given = _own_inputs(token_inputs, student)
    key = token_loss_key(token_loss)
    read = statistics_read(
        find_token_loss(key),
        available_statistics(arguments),
        tuple(given),
        compute_dtype_of(student),
    )
    choice = LossChoice(
        loss=key,
        jsd_beta=_interior(jsd_beta, read, "a token_loss that reads"),
        statistics=_ordered((*_STATISTICS_OF_ALL, *read)),
        inputs=given,
    )
    return run(problem(arguments, student, choice), student_hidden, weight, bias)


class VocabStatistics:
    """The statistics that were asked for, as attributes: each (...,), in nats."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Tensor:
        values: dict[str, Tensor] = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"{name}: not among the statistics asked for: {', '.join(values)}")
        return values[name]


def vocab_statistics(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    *,
    statistics: Sequence[str] = ("forward_kl", "logprob", "entropy"),
    row_mask: Tensor | None = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    jsd_beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    kl_temperature: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    precision: PrecisionChoice = "auto",
    sparse_tolerance: float | None = None,
    sparse_max_columns: int | None = None,
    max_chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    validate: bool = False,
    backend: BackendChoice = "auto",
) -> VocabStatistics:
    """Per-token statistics as differentiable tensors, for losses that couple tokens.

    Any loss of them can be differentiated; the backward computes the logits again, so that the
    whole costs 6 GEMMs where `fused_token_loss` costs 4. Without grad it costs 2.

    Args:
        statistics: of forward_kl, reverse_kl, jsd, ref_kl, logprob, entropy and lse, which are
            differentiable in student_hidden, weight and bias; and teacher_logprob,
            teacher_entropy, teacher_lse and top1_agree, which are constants.
        row_mask: (...,) bool; rows where it is False enter no GEMM; they are 0, without gradient.
        targets: (...,) int64; logprob and teacher_logprob need them.

    The other arguments are those of `fused_hsd_loss`; `sparse_tolerance` concerns the backward.

    Returns:
        one attribute per name asked for, in the leading shape of the inputs.

    Raises:
        ValueError, TypeError: bad input; names the argument, what was found and expected.
    """
    arguments = dict(locals()) | {"weight_grad_out": None, "top_k": 0, "token_weights": None}
    check_needs(arguments)
    student = hidden_states("student_hidden", student_hidden)
    names = _asked_for(statistics, available_statistics(arguments))
    lead, dtype = student.shape[:-1], compute_dtype_of(student)
    arguments["token_weights"] = _weights(row_mask, student)
    choice = LossChoice(
        loss=LINEAR_LOSS,
        jsd_beta=_interior(jsd_beta, names, "statistics with"),
        statistics=_ordered((*_STATISTICS_OF_ALL, *names)),
        inputs={},
    )
    checked = problem(arguments, student, choice)
    values = _values(checked)
    active = checked.active
    found = {}
    for name in names:
        value = values[name].where(active, values[name].new_zeros(()))
        found[name] = (value if name in DIFFERENTIABLE else value.detach()).to(dtype).reshape(lead)
    return VocabStatistics(found)


def _values(checked: Problem) -> dict[str, Tensor]:
    if checked.settings.backend == "reference":
        check_dense(checked)
        return dense_statistics(checked)
    return dict(zip(STATISTICS, statistics_of(checked), strict=True))


def _weights(row_mask: Tensor | None, student: Tensor) -> Tensor:
    lead, dtype = student.shape[:-1], compute_dtype_of(student)
    if row_mask is None:
        return student.new_ones(lead, dtype=dtype)
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        found = row_mask.dtype if isinstance(row_mask, Tensor) else type(row_mask).__name__
        raise TypeError(f"row_mask: found {found}, expected a tensor of torch.bool")
    if row_mask.shape != lead or row_mask.device != student.device:
        raise ValueError(
            f"row_mask: found shape {tuple(row_mask.shape)} on {row_mask.device}, "
            f"expected {tuple(lead)} on {student.device}"
        )
    return row_mask.to(dtype)


def _asked_for(statistics: Sequence[str], available: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(statistics, str) or not isinstance(statistics, Iterable):
        raise ValueError(f"statistics: found {statistics!r}, expected a sequence of names")
    statistics = tuple(statistics)
    if not statistics:
        raise ValueError("statistics: found none, expected a sequence of names")
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(
                f"statistics: found {name!r}, expected some of {', '.join(STATISTICS)}"
            )
        if name not in available:
            raise ValueError(
                f"statistics: found {name!r}, expected the inputs that it needs beside it "
                f"(these allow {', '.join(available)})"
            )
    return statistics


def _own_inputs(token_inputs: object, student: Tensor) -> dict[str, Tensor]:
    """Checked and flattened to (N,)."""
    if not isinstance(token_inputs, Mapping | None):
        found = type(token_inputs).__name__
        raise TypeError(f"token_inputs: found {found}, expected a mapping of names to tensors")
    for name in token_inputs or {}:
        if not isinstance(name, str) or not name or "," in name:  # which separates names in the op
            raise ValueError(f"token_inputs: found the name {name!r}, expected one without commas")
        if name == "token_weights":
            raise ValueError("token_inputs: found 'token_weights', expected it as an argument")
    return per_token_inputs(token_inputs or {}, student, own_input)


def _interior(beta: object, names: Sequence[str], reader: str) -> float:
    """jsd's mixture as a statistic: at 0 and 1 it is one of the KLs, which have their own names.

    Args:
        beta: the argument `jsd_beta`.
        names: of the statistics that are read.
        reader: what would read it, for the error.
    """
    if "jsd" not in names and isinstance(beta, int | float) and beta != 0.5:
        raise ValueError(f"jsd_beta: found {beta}, expected {reader} 'jsd'")
    interior = {"divergence": "jsd", "jsd_beta": beta, "jsd_convention": "interior"}
    return checked_divergence(interior)[2]


def _ordered(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in STATISTICS if name in names)
