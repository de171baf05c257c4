"""From the arguments of `fused_hsd_loss` to a `Problem`, or one clear error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hsd_kernels.checks import (
    check_number,
    check_tensor,
    check_values,
    columns_in_use,
    constant,
    head_rows,
    hidden_states,
    per_token,
    same_kind,
    target_ids,
    temperatures,
)
from hsd_kernels.plan import Precision
from hsd_kernels.problem import Problem, Side
from hsd_kernels.statistics import DIVERGENCES
from hsd_kernels.token_losses import Divergence, HsdLoss

_NOT_YET: Mapping[str, Any] = {
    "sparse_tolerance": None,
    "sparse_max_columns": None,
    "top_k": 0,
    "weight_grad_out": None,
    "process_group": None,
}
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
}


def check(arguments: Mapping[str, Any]) -> Problem:
    """Checks every argument of one call and flattens its leading shape.

    Raises:
        ValueError, TypeError: name the argument, what was found and what was expected.
        NotImplementedError: for an option of the signature that this version does not have.
    """
    a = dict(arguments)
    for name, default in _NOT_YET.items():
        if a[name] is not default and a[name] != default:
            raise NotImplementedError(f"{name}: not available in this version; leave it {default}")
    for name, (default, needed) in _NEEDS.items():
        given = a[name] is not None and (isinstance(a[name], Tensor) or a[name] != default)
        if given and a[needed] is None:
            raise ValueError(f"{name}: found a value, expected {needed} beside it")

    student, weight = hidden_states("student_hidden", a["student_hidden"]), a["weight"]
    lead = student.shape[:-1]
    vocab_size = head_rows("weight", weight, student, "student_hidden", a["bias"], "bias")
    vocab_size = columns_in_use(a["vocab_size"], vocab_size)
    sides = {
        name: _side(name, a, student, weight, vocab_size)
        for name in ("teacher", "ref")
        if a[f"{name}_hidden"] is not None
    }
    compute = torch.float64 if student.dtype == torch.float64 else torch.float32
    count = math.prod(lead)
    inputs = {
        name: per_token(name, a[name], lead, student.device, compute)
        for name in (
            "token_weights",
            "kl_weights",
            "pg_weights",
            "ref_weights",
            "advantages",
            "old_logprobs",
        )
        if a[name] is not None
    }
    if "token_weights" not in inputs:
        inputs["token_weights"] = student.new_full((count,), 1 / max(count, 1), dtype=compute)
    targets = target_ids(a["targets"], lead, student.device)
    if student.device.type == "cpu" or a["validate"]:
        check_values(inputs, targets, vocab_size)
    temperature = temperatures("temperature", a["temperature"], lead, student, compute)
    kl_temperature, teacher_temperature = temperature, None
    if a["kl_temperature"] is not None:
        if not sides:
            raise ValueError("kl_temperature: found a value, expected teacher_hidden or ref_hidden")
        kl_temperature = temperatures("kl_temperature", a["kl_temperature"], lead, student, compute)
    if a["teacher_temperature"] is not None:
        teacher_temperature = temperatures(
            "teacher_temperature", a["teacher_temperature"], lead, student, compute
        )
    loss, jsd_beta = _loss(a, sides)
    return Problem(
        student=student.reshape(count, student.shape[-1]),
        weight=weight[:vocab_size],
        bias=None if a["bias"] is None else a["bias"][:vocab_size],
        teacher=sides.get("teacher"),
        reference=sides.get("ref"),
        targets=targets,
        inputs=inputs,
        loss=loss,
        jsd_beta=jsd_beta,
        temperature=temperature,
        kl_temperature=kl_temperature,
        teacher_temperature=kl_temperature if teacher_temperature is None else teacher_temperature,
        one_temperature=a["kl_temperature"] is None,
        teacher_shares_temperature=teacher_temperature is None,
        logit_scale=check_number("logit_scale", a["logit_scale"]),
        logit_softcap=None
        if a["logit_softcap"] is None
        else check_number("logit_softcap", a["logit_softcap"], positive=True),
        precision=_precision(a["precision"]),
        max_chunk_bytes=_chunk_bytes(a["max_chunk_bytes"]),
        compute_dtype=compute,
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
    return Side(
        hidden=hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1]),
        weight=own[:vocab],
        bias=None if bias is None else bias[:vocab],
        shared_head=shared,
    )


def _precision(value: object) -> Precision:
    if value == "difference":
        raise NotImplementedError(
            "precision: 'difference' is not available in this version; expected 'auto'"
        )
    if value not in ("auto", "fp32_logits", "bf16_logits"):
        raise ValueError(
            f"precision: found {value!r}, expected 'auto', 'fp32_logits' or 'bf16_logits'"
        )
    return cast(Precision, "fp32_logits" if value == "auto" else value)


def _chunk_bytes(value: object) -> int | None:
    if value is None:
        return None
    number = check_number("max_chunk_bytes", value, positive=True)
    return int(number)


def _loss(a: Mapping[str, Any], sides: Mapping[str, Side]) -> tuple[HsdLoss, float]:
    """The token loss of this call, and the jsd's beta."""
    divergence, scale, beta = _divergence(a)
    low, high = _clip_range(a["clip_range"])
    cap = a["token_kl_cap"]
    loss = HsdLoss(
        divergence=divergence if "teacher" in sides else None,
        divergence_scale=scale,
        kl_coef=check_number("kl_coef", a["kl_coef"]),
        ref_coef=check_number("ref_coef", a["ref_coef"]),
        pg_coef=check_number("pg_coef", a["pg_coef"]),
        entropy_coef=check_number("entropy_coef", a["entropy_coef"]),
        token_kl_cap=None if cap is None else check_number("token_kl_cap", cap, positive=True),
        clip_range=(low, high),
    )
    if not sides and a["advantages"] is None and loss.entropy_coef == 0:
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


def _divergence(a: Mapping[str, Any]) -> tuple[Divergence, float, float]:
    """Divergence, its scale, and beta. jsd becomes a plain KL at beta 0 and 1."""
    name, beta, convention = a["divergence"], a["jsd_beta"], a["jsd_convention"]
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: found {name!r}, expected one of {', '.join(DIVERGENCES)}")
    if convention not in ("gkd", "interior", "scaled"):
        raise ValueError(
            f"jsd_convention: found {convention!r}, expected 'gkd', 'interior' or 'scaled'"
        )
    beta = check_number("jsd_beta", beta)
    if name != "jsd":
        if beta != 0.5 or convention != "gkd":
            raise ValueError(f"jsd_beta, jsd_convention: expected divergence='jsd', found {name!r}")
        return name, 1.0, beta
    if not 0 <= beta <= 1:
        raise ValueError(f"jsd_beta: found {beta}, expected 0 to 1")
    if beta in (0.0, 1.0):
        if convention == "interior":
            raise ValueError(
                f"jsd_beta: found {beta}, expected 0 < jsd_beta < 1 with the 'interior' convention"
            )
        return "forward_kl" if beta == 0 else "reverse_kl", 1.0, 0.5
    return name, 1 / (beta * (1 - beta)) if convention == "scaled" else 1.0, beta
