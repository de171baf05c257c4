"""Errors of the loss by how logits are held: the tables of docs/precision.md.

    python benchmarks/precision.py

Forward KL of random hidden states, against dense fp64 on the same values. Deterministic up to the
rounding of a machine's matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsd_kernels import fused_hsd_loss

TOKENS, HIDDEN, VOCAB = 64, 64, 8192
OFFSETS = (0.0, 40.0)  # nats that all logits of both sides have in common
MODES: dict[str, dict[str, Any]] = {
    "rounded to bf16": {"precision": "bf16_logits"},
    "fp32, two sets of logits": {"own_head": True},
    "fp32, difference form": {},
}
NARROW_MODES: dict[str, dict[str, Any]] = {  # of bf16 inputs
    "plain PyTorch in bf16": {"plain": True},
    "16 bits, difference form": {"precision": "difference"},
    "fp32 from 16-bit inputs": {"precision": "fp32_logits"},
}
QUANTITIES = ("d student", "d head", "KL per token")
DIVERGENCES = (1e-4, 1e-2, 1.0)


def problem(kl: float, offset: float) -> dict[str, Tensor]:
    """fp32 states under one head, KL(teacher || student) about `kl` nats, entropy about 6."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = 2 * normal(VOCAB, HIDDEN) / HIDDEN**0.5
    student, direction = normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN)
    weight[:, 0], student[:, 0], direction[:, 0] = 1, offset, 0
    low, high = 0.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        sides = {"student_hidden": student, "teacher_hidden": student + middle * direction}
        found = fused_hsd_loss(**sides, weight=weight).loss.item()
        low, high = (middle, high) if found < kl else (low, middle)
    return {**sides, "weight": weight}


def solve(given: dict[str, Tensor], *, own_head: bool = False, **options: Any) -> dict[str, Tensor]:
    """The gradients, and the KL of each token."""
    leaves = {name: given[name].detach().requires_grad_() for name in ("student_hidden", "weight")}
    own = {"teacher_weight": given["weight"].clone()} if own_head else {}
    out = fused_hsd_loss(**{**given, **leaves}, **own, **options)
    out.loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**gradients, "kl": out.stats.kl}


def solve_plainly(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by log-softmaxes of the logits, in the dtype of the inputs."""
    student, weight = (given[n].detach().requires_grad_() for n in ("student_hidden", "weight"))
    log_p = torch.log_softmax(student @ weight.T, -1)
    log_q = torch.log_softmax(given["teacher_hidden"] @ weight.detach().T, -1)
    kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    student_grad, weight_grad = torch.autograd.grad(kl.mean(), (student, weight))
    return {"student_hidden": student_grad, "weight": weight_grad, "kl": kl.detach()}


def errors(
    kl: float, offset: float, dtype: torch.dtype, modes: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """By mode: relative errors (Euclidean norm) of d student, d head, KL per token."""
    given = {name: value.to(dtype) for name, value in problem(kl, offset).items()}
    exact = solve({name: value.double() for name, value in given.items()}, backend="reference")
    return {
        mode: [
            ((found - exact[name]).norm() / exact[name].norm()).item()
            for name, found in _solved(given, **options).items()
        ]
        for mode, options in modes.items()
    }


def _solved(given: dict[str, Tensor], *, plain: bool = False, **options: Any) -> dict[str, Tensor]:
    return solve_plainly(given) if plain else solve(given, **options)


def table(dtype: torch.dtype, modes: dict[str, dict[str, Any]]) -> str:
    head = " | ".join(f"{name}, offset {offset:g}" for offset in OFFSETS for name in QUANTITIES)
    lines = [f"| logits | KL | {head} |", "|---|---|" + "---|" * len(QUANTITIES) * len(OFFSETS)]
    found = {
        (kl, offset): errors(kl, offset, dtype, modes) for kl in DIVERGENCES for offset in OFFSETS
    }
    for mode in modes:
        for kl in DIVERGENCES:
            numbers = [error for offset in OFFSETS for error in found[kl, offset][mode]]
            cells = " | ".join(f"{error:.0e}" for error in numbers)
            lines.append(f"| {mode} | {kl:g} | {cells} |")
    return "\n".join(lines)


def tables() -> str:
    wide = table(torch.float32, MODES)
    return f"{wide}\n\n{table(torch.bfloat16, NARROW_MODES)}"


if __name__ == "__main__":
    print(tables())
