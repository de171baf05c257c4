"""The options of a call, checked: numbers, names and flags, and what they need beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hsd_kernels.checks import (
    check_bytes,
    check_choice,
    check_count,
    check_flag,
    check_number,
    group_name,
)
from hsd_kernels.plan import Backend, Precision
from hsd_kernels.problem import Settings
from hsd_kernels.statistics import DIVERGENCES
from hsd_kernels.token_losses import Divergence

# Options that mean nothing without another argument: name -> (its default, what it needs).
_NEEDS: Mapping[str, tuple[Any, str]] = {
    "divergence": ("forward_kl", "teacher_hidden"),
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


@dataclass(frozen=True, kw_only=True)
class LossChoice:
    """What distinguishes the public functions: which loss, of which statistics and inputs."""

    loss: str
    loss_scalars: tuple[float, ...] = ()
    divergence: str = ""
    jsd_beta: float = 0.5
    statistics: tuple[str, ...]
    inputs: Mapping[str, Tensor]  # (N,) each


def check_needs(arguments: Mapping[str, Any]) -> None:
    """An option without the argument that gives it a meaning is an error, not ignored."""
    for name, (default, needed) in _NEEDS.items():
        if name not in arguments:
            continue
        value = arguments[name]
        comparable = isinstance(value, int | float | str | tuple | list)
        given = value is not None and not (comparable and value == default)
        if given and arguments[needed] is None:
            raise ValueError(f"{name}: found a value, expected {needed} beside it")


def settings_of(
    a: Mapping[str, Any], student: Tensor, choice: LossChoice, vocab_size: int, *, sharded: bool
) -> Settings:
    softcap = a["logit_softcap"]
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
        max_chunk_bytes=check_bytes("max_chunk_bytes", a["max_chunk_bytes"]),
        group=group_name(a["process_group"]),
        validate=check_flag("validate", a["validate"]),
        backend=backend,
    )


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


def checked_clip_range(value: object) -> tuple[float, float]:
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
