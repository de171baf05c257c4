"""From the arguments of a public loss to a `Problem`, or one clear error.

Only what can be seen without reading a tensor's values is checked here, so that it can be traced;
values are checked where the problem is solved (`check_values`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hsd_kernels.checks import (
    check_number,
    check_tensor,
    columns_in_use,
    constant,
    head_rows,
    hidden_states,
    per_token,
    same_kind,
    target_ids,
    temperatures,
)
from hsd_kernels.options import (
    LossChoice,
    check_needs,
    checked_clip_range,
    checked_divergence,
    settings_of,
)
from hsd_kernels.problem import Problem, Side
from hsd_kernels.statistics import DIVERGENCES
from hsd_kernels.token_losses import HSD_LOSS, HsdLoss

_HSD_INPUTS = ("kl_weights", "pg_weights", "ref_weights", "advantages", "old_logprobs")


def check(arguments: Mapping[str, Any]) -> Problem:
    """Checks every argument of one call of `fused_hsd_loss` and flattens its leading shape.

    Raises:
        ValueError, TypeError: name the argument, what was found and what was expected.
    """
    a = dict(arguments)
    check_needs(a)
    student = hidden_states("student_hidden", a["student_hidden"])
    loss, beta = _loss(a)
    given = {name: a[name] for name in _HSD_INPUTS if a[name] is not None}
    choice = LossChoice(
        loss=HSD_LOSS,
        loss_scalars=tuple(loss.scalars()),
        divergence=loss.divergence or "",
        jsd_beta=beta,
        statistics=available_statistics(a, divergences=(loss.divergence,)),
        inputs=per_token_inputs(given, student),
    )
    return problem(a, student, choice)


def available_statistics(
    arguments: Mapping[str, Any], *, divergences: tuple[str | None, ...] = DIVERGENCES
) -> tuple[str, ...]:
    """Names of the statistics that the sides and targets given allow."""
    names: list[str] = ["lse", "entropy"]
    if arguments["targets"] is not None:
        names.append("logprob")
    if arguments["teacher_hidden"] is not None:
        names += [name for name in divergences if name is not None]
        names += ["teacher_lse", "teacher_entropy", "top1_agree"]
        if arguments["targets"] is not None:
            names.append("teacher_logprob")
    if arguments["ref_hidden"] is not None:
        names.append("ref_kl")
    return tuple(names)


def compute_dtype_of(student: Tensor) -> torch.dtype:
    """Of logits, statistics and accumulation."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def per_token_inputs(
    given: Mapping[str, Any], student: Tensor, label: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Checked and flattened to (N,), in the compute dtype; `label` names one in an error."""
    lead, dtype = student.shape[:-1], compute_dtype_of(student)
    return {
        name: per_token(label(name), value, lead, student.device, dtype)
        for name, value in given.items()
    }


def problem(a: Mapping[str, Any], student: Tensor, choice: LossChoice) -> Problem:
    """The problem of a call; `a` holds the arguments that all public losses share."""
    lead, compute = student.shape[:-1], compute_dtype_of(student)
    count, weight = math.prod(lead), a["weight"]
    rows = head_rows("weight", weight, student, "student_hidden", a["bias"], "bias")
    sharded = a["process_group"] is not None
    vocab_size = columns_in_use(a["vocab_size"], rows, sharded=sharded)
    sides = {
        name: _side(name, a, student, weight, 0 if sharded else vocab_size)
        for name in ("teacher", "ref")
        if a[f"{name}_hidden"] is not None
    }
    weights = a["token_weights"]
    if weights is None:
        weights = student.new_full(lead, 1 / max(count, 1), dtype=compute)
    kl_temperature = temperature = temperatures(
        "temperature", a["temperature"], lead, student, compute
    )
    if a["kl_temperature"] is not None:
        if not sides:
            raise ValueError("kl_temperature: found a value, expected teacher_hidden or ref_hidden")
        kl_temperature = temperatures("kl_temperature", a["kl_temperature"], lead, student, compute)
    teacher_temperature = kl_temperature
    if a["teacher_temperature"] is not None:
        teacher_temperature = temperatures(
            "teacher_temperature", a["teacher_temperature"], lead, student, compute
        )
    return Problem(
        student=student.reshape(count, student.shape[-1]),
        weight=weight,
        bias=a["bias"],
        teacher=sides.get("teacher"),
        reference=sides.get("ref"),
        targets=target_ids(a["targets"], lead, student.device),
        inputs={**per_token_inputs({"token_weights": weights}, student), **choice.inputs},
        temperature=temperature,
        kl_temperature=kl_temperature,
        teacher_temperature=teacher_temperature,
        weight_grad_out=_accumulator(a["weight_grad_out"], weight),
        settings=settings_of(a, student, choice, vocab_size, sharded=sharded),
    )


def _side(name: str, a: Mapping[str, Any], student: Tensor, weight: Tensor, vocab: int) -> Side:
    """The teacher's or the reference's hidden states and head."""
    hidden_name = f"{name}_hidden"
    hidden = hidden_states(hidden_name, a[hidden_name])
    constant(hidden_name, hidden)
    if hidden.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"{hidden_name}: found shape {tuple(hidden.shape)}, "
            f"expected {tuple(student.shape[:-1])} + (D,) as student_hidden"
        )
    same_kind(hidden_name, hidden, "student_hidden", student)
    own, bias = a[f"{name}_weight"], a[f"{name}_bias"]
    shared = own is None
    if shared:
        own, bias = weight.detach(), None if a["bias"] is None else a["bias"].detach()
        if hidden.shape[-1] != student.shape[-1]:
            raise ValueError(
                f"{hidden_name}: found size {hidden.shape[-1]}, expected {student.shape[-1]}, "
                f"or give {name}_weight"
            )
    else:
        for label, value in ((f"{name}_weight", own), (f"{name}_bias", bias)):
            if value is not None:
                constant(label, check_tensor(label, value))
        rows = head_rows(f"{name}_weight", own, hidden, hidden_name, bias, f"{name}_bias")
        if rows < vocab:
            raise ValueError(f"{name}_weight: found {rows} rows, expected at least {vocab}")
        if vocab == 0 and rows != weight.shape[0]:
            raise ValueError(
                f"{name}_weight: found {rows} rows, expected {weight.shape[0]}: "
                "with process_group every head is sharded like weight"
            )
    return Side(
        hidden=hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]),
        weight=own,
        bias=bias,
        shared_head=shared,
    )


def _accumulator(value: object, weight: Tensor) -> Tensor | None:
    if value is None:
        return None
    out = check_tensor("weight_grad_out", value)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if out.shape != weight.shape or out.dtype != dtype or out.device != weight.device:
        raise ValueError(
            f"weight_grad_out: found {tuple(out.shape)} {out.dtype} on {out.device}, "
            f"expected {tuple(weight.shape)} {dtype} on {weight.device}"
        )
    if any(step == 0 < size - 1 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            "weight_grad_out: found an expanded tensor, whose elements share memory, "
            "expected memory for each"
        )
    constant("weight_grad_out", out)
    return out


def _loss(a: Mapping[str, Any]) -> tuple[HsdLoss, float]:
    """The token loss of this call, and the jsd's beta."""
    divergence, scale, beta = checked_divergence(a)
    low, high = checked_clip_range(a["clip_range"])
    cap = a["token_kl_cap"]
    loss = HsdLoss(
        divergence=divergence if a["teacher_hidden"] is not None else None,
        divergence_scale=scale,
        kl_coef=check_number("kl_coef", a["kl_coef"]),
        ref_coef=check_number("ref_coef", a["ref_coef"]),
        pg_coef=check_number("pg_coef", a["pg_coef"]),
        entropy_coef=check_number("entropy_coef", a["entropy_coef"]),
        token_kl_cap=None if cap is None else check_number("token_kl_cap", cap, positive=True),
        clip_range=(low, high),
    )
    terms = (a["teacher_hidden"], a["ref_hidden"], a["advantages"])
    if all(term is None for term in terms) and loss.entropy_coef == 0:
        raise ValueError(
            "teacher_hidden: found None, and no ref_hidden, advantages or entropy_coef; "
            "expected at least one term"
        )
    return loss, beta
