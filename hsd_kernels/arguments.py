"""From the arguments of a public loss to a `Problem`, or one clear error.

Only what can be seen without reading a tensor's values is checked here, so that it can be traced;
values are checked where the problem is solved (`check_values`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hsd_kernels.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_tensor,
    columns_in_use,
    constant,
    group_name,
    head_rows,
    hidden_states,
    per_token,
    same_kind,
    target_ids,
    temperatures,
)
from hsd_kernels.plan import Backend, Precision
from hsd_kernels.problem import Problem, Settings, Side
from hsd_kernels.statistics import DIVERGENCES
from hsd_kernels.token_losses import HSD_LOSS, Divergence, HsdLoss

# Options that mean nothing without another argument: name -> (its default, what it needs).
_NEEDS: Mapping[str, tuple[Any, str]] = {
    "kl_coef": (1.0, "teacher_hidden"),
    "kl_weights": (None, "teacher_hidden"),
    "token_kl_cap": (None, "teacher_hidden"),
    "teacher_weight": (None, "teacher_hidden"),
    "teacher_bias": (None, "teacher_weight"),
    "teacher_temperature": (None, "teacher_hidden"),
    "ref_coef": (0.0, "ref_hidden"),
    "ref_weights": (None, "ref_hidden"),
    "ref_weight": (None, "ref_hidden"),
    "ref_bias": (None, "ref_weight"),
    "advantages": (None, "targets"),
    "old_logprobs": (None, "advantages"),
    "pg_weights": (None, "advantages"),
    "pg_coef": (1.0, "advantages"),
    "clip_range": ((0.2, 0.2), "advantages"),
    "sparse_max_columns": (None, "sparse_tolerance"),
}
_HSD_INPUTS = ("kl_weights", "pg_weights", "ref_weights", "advantages", "old_logprobs")


@dataclass(frozen=True, kw_only=True)
class LossChoice:
    """What distinguishes the public functions: which loss, of which statistics and inputs."""

    loss: str
    loss_scalars: tuple[float, ...] = ()
    divergence: str = ""
    jsd_beta: float = 0.5
    statistics: tuple[str, ...]
    inputs: Mapping[str, Tensor]  # (N,) each


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


def check_needs(arguments: Mapping[str, Any]) -> None:
    """An option without the argument that gives it a meaning is an error, not ignored."""
    for name, (default, needed) in _NEEDS.items():
        if name not in arguments:
            continue
        value = arguments[name]
        given = value is not None and (isinstance(value, Tensor) or value != default)
        if given and arguments[needed] is None:
            raise ValueError(f"{name}: found a value, expected {needed} beside it")


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


def per_token_inputs(given: Mapping[str, Any], student: Tensor) -> dict[str, Tensor]:
    """Checked and flattened to (N,), in the compute dtype."""
    lead, dtype = student.shape[:-1], compute_dtype_of(student)
    return {
        name: per_token(name, value, lead, student.device, dtype) for name, value in given.items()
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
        settings=_settings(a, student, choice, vocab_size, sharded=sharded),
    )


def _settings(
    a: Mapping[str, Any], student: Tensor, choice: LossChoice, vocab_size: int, *, sharded: bool
) -> Settings:
    softcap, chunk = a["logit_softcap"], a["max_chunk_bytes"]
    tolerance, columns = a["sparse_tolerance"], a["sparse_max_columns"]
    if tolerance is not None:
        tolerance = check_number("sparse_tolerance", tolerance)
        if not 0 < tolerance < 1:
            raise ValueError(f"sparse_tolerance: found {tolerance}, expected 0 < value < 1 or None")
    backend = _backend(a["backend"], student)
    top_k = check_count("top_k", a["top_k"], lowest=0)
    if top_k > (0 if sharded else vocab_size):
        limit = "0 with process_group" if sharded else f"at most {vocab_size}, columns in use"
        raise ValueError(f"top_k: found {top_k}, expected {limit}")
    return Settings(
        loss=choice.loss,
        loss_scalars=choice.loss_scalars,
        divergence=choice.divergence,
        statistics=",".join(choice.statistics),
        jsd_beta=choice.jsd_beta,
        one_temperature=a["kl_temperature"] is None,
        teacher_shares_temperature=a["teacher_temperature"] is None,
        logit_scale=check_number("logit_scale", a["logit_scale"]),
        logit_softcap=None
        if softcap is None
        else check_number("logit_softcap", softcap, positive=True),
        vocab_size=vocab_size,
        precision=_precision(a["precision"], backend, student.dtype),
        sparse_tolerance=tolerance,
        sparse_max_columns=None
        if columns is None
        else check_count("sparse_max_columns", columns, lowest=1),
        top_k=top_k,
        max_chunk_bytes=None
        if chunk is None
        else int(check_number("max_chunk_bytes", chunk, positive=True)),
        group=group_name(a["process_group"]),
        validate=check_flag("validate", a["validate"]),
        backend=backend,
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
    constant("weight_grad_out", out)
    return out


def _precision(given: object, backend: Backend, dtype: torch.dtype) -> Precision:
    value = check_choice("precision", given, ("auto", "fp32_logits", "difference", "bf16_logits"))
    if value == "auto":
        # A CPU multiplies bf16 several times as fast as fp32, but has no wider output for it.
        on_cpu = backend == "cpu" and dtype == torch.bfloat16
        value = "difference" if on_cpu else "fp32_logits"
    elif value == "difference" and (dtype != torch.bfloat16 or backend == "reference"):
        found = "backend='reference'" if backend == "reference" else f"{dtype}"
        raise ValueError(
            f"precision: found 'difference' with {found}, expected torch.bfloat16 inputs on "
            "another backend (with others 'auto' holds fp32 logits)"
        )
    return cast(Precision, value)


def _backend(value: object, student: Tensor) -> Backend:
    backend = check_choice("backend", value, ("auto", "triton", "cpu", "reference"))
    on_cpu = student.device.type == "cpu"
    if backend == "auto":
        return "cpu" if on_cpu else "triton"
    if backend == "cpu" and not on_cpu:
        raise ValueError(
            f"backend: found 'cpu' with student_hidden on {student.device}, expected CPU tensors"
        )
    return cast(Backend, backend)


def _loss(a: Mapping[str, Any]) -> tuple[HsdLoss, float]:
    """The token loss of this call, and the jsd's beta."""
    divergence, scale, beta = checked_divergence(a)
    low, high = _clip_range(a["clip_range"])
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


def _clip_range(value: object) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"clip_range: found {value!r}, expected a pair (low, high)")
    low, high = (check_number("clip_range", bound) for bound in value)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"clip_range: found {(low, high)}, expected 0 <= low <= 1 and high >= 0")
    return low, high


def checked_divergence(a: Mapping[str, Any]) -> tuple[Divergence, float, float]:
    """Divergence, its scale, and beta. jsd becomes a plain KL at beta 0 and 1."""
    name = check_choice("divergence", a["divergence"], DIVERGENCES)
    convention = check_choice("jsd_convention", a["jsd_convention"], ("gkd", "interior", "scaled"))
    beta = check_number("jsd_beta", a["jsd_beta"])
    if name != "jsd":
        if beta != 0.5 or convention != "gkd":
            raise ValueError(f"jsd_beta, jsd_convention: expected divergence='jsd', found {name!r}")
        return cast(Divergence, name), 1.0, beta
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd_beta: found {beta}, expected 0 to 1")
    if beta in (0.0, 1.0):
        if convention == "interior":
            raise ValueError(
                f"jsd_beta: found {beta}, expected 0 < jsd_beta < 1 with the 'interior' convention"
            )
        return "forward_kl" if beta == 0 else "reverse_kl", 1.0, 0.5
    return "jsd", 1 / (beta * (1 - beta)) if convention == "scaled" else 1.0, beta
