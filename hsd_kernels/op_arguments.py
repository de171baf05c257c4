"""A problem as the arguments of the custom ops, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hsd_kernels.problem import Problem, Settings, Side


def arguments_of(problem: Problem) -> dict[str, Any]:
    """A problem as arguments of the ops, wanted gradients apart.

    Raises:
        RuntimeError: a tensor has a tangent, which an op without a forward derivative would drop.
    """
    arguments: dict[str, Any] = {
        "student": problem.student,
        "weight": problem.weight,
        "bias": problem.bias,
        "targets": problem.targets,
        "input_names": ",".join(problem.inputs),
        "input_values": list(problem.inputs.values()),
        "temperature": problem.temperature,
        "kl_temperature": problem.kl_temperature,
        "teacher_temperature": problem.teacher_temperature,
        "weight_grad_out": problem.weight_grad_out,
    }
    for name in ("teacher", "reference"):
        side: Side | None = getattr(problem, name)
        own = side is not None and not side.shared_head
        arguments[name] = None if side is None else side.hidden
        arguments[f"{name}_weight"] = side.weight if side is not None and own else None
        arguments[f"{name}_bias"] = side.bias if side is not None and own else None
    settings = problem.settings
    for name in Settings.__dataclass_fields__:
        arguments[name] = getattr(settings, name)
    # An empty list would pass for a list of tensors, which autograd wants gradients of.
    arguments["loss_scalars"] = list(settings.loss_scalars) or [0.0]
    if not torch.compiler.is_compiling():
        _refuse_tangents(arguments)
    return arguments


def _refuse_tangents(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Tensor) and forward_ad.unpack_dual(each).tangent is not None:  # type: ignore[no-untyped-call]
                raise RuntimeError(
                    f"hsd_kernels: found a forward-mode derivative (torch.func.jvp, jacfwd) of "
                    f"{name}, but only gradients are formed; expected backend='reference' for that"
                )


def problem_of(a: Mapping[str, Any]) -> Problem:
    """The inverse of `arguments_of`."""

    def side(name: str) -> Side | None:
        if a[name] is None:
            return None
        shared = a[f"{name}_weight"] is None
        weight, bias = a["weight"].detach(), a["bias"]
        return Side(
            hidden=a[name],
            weight=weight if shared else a[f"{name}_weight"],
            bias=(None if bias is None else bias.detach()) if shared else a[f"{name}_bias"],
            shared_head=shared,
        )

    settings = {name: a[name] for name in Settings.__dataclass_fields__}
    settings["loss_scalars"] = tuple(a["loss_scalars"])
    return Problem(
        student=a["student"],
        weight=a["weight"],
        bias=a["bias"],
        teacher=side("teacher"),
        reference=side("reference"),
        targets=a["targets"],
        inputs=dict(zip(a["input_names"].split(","), a["input_values"], strict=True)),
        temperature=a["temperature"],
        kl_temperature=a["kl_temperature"],
        teacher_temperature=a["teacher_temperature"],
        weight_grad_out=a["weight_grad_out"],
        settings=Settings(**settings),
    )
