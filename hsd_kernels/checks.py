"""Checks of single arguments; each error names the argument, what was found and what expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hsd_kernels.token_losses import HSD_LOSS, LINEAR_LOSS

if TYPE_CHECKING:
    from hsd_kernels.problem import Problem

_LARGEST_INTEGER = 2**63 - 1  # that an op takes
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, DTensor):
        raise TypeError(
            f"{name}: found a DTensor, expected a plain tensor; unshard it first "
            "(FSDPModule.unshard() or .full_tensor())"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a tensor")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"{name}: found {kind}, expected a dense tensor (torch.strided)")
    return value


def hidden_states(name: str, value: object) -> Tensor:
    hidden = check_tensor(name, value)
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"{name}: found {hidden.dtype}, expected one of {_names(_FLOATS)}")
    if hidden.dim() < 2 or hidden.shape[-1] == 0:
        raise ValueError(f"{name}: found shape {tuple(hidden.shape)}, expected (..., D), D > 0")
    return hidden


def same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: found device {value.device}, expected {other.device} as {other_name}"
        )
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: found {value.dtype}, expected {other.dtype} as {other_name}")


def head_rows(
    name: str, weight: object, hidden: Tensor, hidden_name: str, bias: object, bias_name: str
) -> int:
    """Checks a head against its hidden states; returns its number of rows."""
    weight = check_tensor(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: found shape {tuple(weight.shape)}, "
            f"expected (V, {hidden.shape[-1]}) to match {hidden_name}"
        )
    same_kind(name, weight, hidden_name, hidden)
    if bias is not None:
        bias = check_tensor(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{bias_name}: found shape {tuple(bias.shape)}, expected ({weight.shape[0]},)"
            )
        same_kind(bias_name, bias, hidden_name, hidden)
    return weight.shape[0]


def columns_in_use(vocab_size: object, rows: int, *, sharded: bool) -> int:
    """V; 0 for all rows of a sharded head, whose number no rank knows alone."""
    if vocab_size is None:
        return 0 if sharded else rows
    size = check_count("vocab_size", vocab_size, lowest=1 if sharded else -(2**62))
    if not sharded and not 0 < size <= rows:
        raise ValueError(f"vocab_size: found {size}, expected 1 to {rows}, rows of weight")
    return size


def constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name}: found requires_grad=True, expected a detached tensor; it gets no gradient"
        )


def shaped(name: str, value: object, lead: torch.Size, device: torch.device) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.shape != lead:
        raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(lead)}")
    if tensor.device != device:
        raise ValueError(f"{name}: found device {tensor.device}, expected {device}")
    constant(name, tensor)
    return tensor.flatten()


def per_token(
    name: str, value: object, lead: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    tensor = shaped(name, value, lead, device)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: found {tensor.dtype}, expected a floating-point dtype")
    return tensor.to(dtype)


def own_input(name: str) -> str:
    """What errors call an input of a loss of one's own."""
    return f"token_inputs[{name!r}]"


def target_ids(value: object, lead: torch.Size, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    tensor = shaped("targets", value, lead, device)
    if tensor.dtype != torch.int64:
        raise TypeError(f"targets: found {tensor.dtype}, expected torch.int64")
    return tensor


def check_values(problem: Problem, vocab_size: int) -> None:
    """Checks what only the values show; on a GPU this waits for the device.

    Args:
        problem: the call.
        vocab_size: columns in use, over all shards.

    Raises:
        ValueError: names the argument, what was found where, and what was expected.
    """
    active, loss = problem.active, problem.settings.loss
    for name, values in problem.inputs.items():
        if loss == LINEAR_LOSS and name != "token_weights":  # autograd's: NaN passes through it
            continue
        of_caller = loss == HSD_LOSS or name == "token_weights"
        label = name if of_caller else own_input(name)
        _check_everywhere(label, values, active & ~torch.isfinite(values), "finite values")
    for name in ("temperature", "kl_temperature", "teacher_temperature"):
        values = getattr(problem, name)
        bad = ~(torch.isfinite(values) & (values > 0))
        _check_everywhere(name, values, bad, "finite numbers > 0")
    if problem.targets is not None:
        bad = active & _outside(problem.targets, vocab_size)
        expected = f"0 to {vocab_size - 1} (or token_weights 0 there)"
        _check_everywhere("targets", problem.targets, bad, expected)


def _check_everywhere(name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    if bad.any():
        raise ValueError(
            f"{name}: found {values[bad][0].item()} at token {bad.nonzero()[0].item()}, "
            f"expected {expected}"
        )


def poison(problem: Problem, vocab_size: int) -> Problem:
    """Gives tokens with an impossible target the weight NaN: what is not checked must show."""
    if problem.targets is None:
        return problem
    weights = problem.inputs["token_weights"]
    bad = (weights != 0) & _outside(problem.targets, vocab_size)
    poisoned = torch.where(bad, torch.nan, weights)
    return replace(problem, inputs={**problem.inputs, "token_weights": poisoned})


def _outside(targets: Tensor, vocab_size: int) -> Tensor:
    return (targets < 0) | (targets >= vocab_size)


def group_name(value: object) -> str:
    """Of a process group; "" for None."""
    if value is None:
        return ""
    name = getattr(value, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"process_group: found {type(value).__name__}, "
            "expected a torch.distributed.ProcessGroup of which this process is a member"
        )
    return name


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name}: found {value!r}, expected one of {', '.join(map(repr, choices))}"
        )
    return value


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r}, expected True or False")
    return value


def check_count(name: str, value: object, *, lowest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: found {type(value).__name__}, expected an integer")
    if value < lowest:
        raise ValueError(f"{name}: found {value}, expected at least {lowest}")
    if value > _LARGEST_INTEGER:
        raise ValueError(f"{name}: found {value}, expected at most {_LARGEST_INTEGER}")
    return value


def check_bytes(name: str, value: object) -> int | None:
    """A number of bytes; None stays None."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a number of bytes")
    if not 0 < value <= _LARGEST_INTEGER:
        raise ValueError(f"{name}: found {value}, expected > 0 bytes, and fewer than 2^63")
    return int(value)


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: found {type(value).__name__}, expected a number")
    # Logits and losses are computed in float32: what it cannot hold would become 0 or infinite.
    range_of = torch.finfo(torch.float32)
    if not abs(value) <= range_of.max or (positive and value < range_of.tiny):
        expected = f"a finite number{' > 0' * positive}, in the range of float32"
        raise ValueError(f"{name}: found {value}, expected {expected}")
    return float(value)


def temperatures(
    name: str, value: object, lead: torch.Size, student: Tensor, dtype: torch.dtype
) -> Tensor:
    if not isinstance(value, Tensor):
        number = check_number(name, value, positive=True)
        return student.new_full((math.prod(lead),), number, dtype=dtype)
    return per_token(name, value, lead, student.device, dtype)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
