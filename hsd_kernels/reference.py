"""The dense truth: the formulas as they are written, with autograd, in the dtype of the inputs.

It holds several N x V matrices. fp64 inputs give fp64 results, which judge every other backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsd_kernels.checks import check_values
from hsd_kernels.problem import Problem, Side


def dense_logits(
    problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor
) -> Tensor:
    """softcap * tanh(logit_scale * (x W^T + bias) / softcap) / temperature, (N, V)."""
    dtype, settings = problem.compute_dtype, problem.settings
    logits = hidden.to(dtype) @ weight[: settings.vocab_size].to(dtype).T
    if bias is not None:
        logits = logits + bias[: settings.vocab_size].to(dtype)
    if settings.precision == "bf16_logits":
        logits = logits.bfloat16().to(dtype)
    logits = logits * settings.logit_scale
    if settings.logit_softcap is not None:
        logits = settings.logit_softcap * torch.tanh(logits / settings.logit_softcap)
    return logits / temperature[:, None]


def dense_statistics(problem: Problem) -> dict[str, Tensor]:
    """Every statistic that the problem's inputs allow, (N,) each, differentiable."""

    def student(temperature: Tensor) -> Tensor:
        return dense_logits(problem, problem.student, problem.weight, problem.bias, temperature)

    def other(side: Side, temperature: Tensor) -> Tensor:
        return dense_logits(problem, side.hidden, side.weight, side.bias, temperature).detach()

    def at_target(log_probs: Tensor, targets: Tensor) -> Tensor:
        return log_probs.gather(-1, targets.clamp(0, log_probs.shape[-1] - 1)[:, None]).squeeze(-1)

    logits = student(problem.temperature)
    log_p = logits.log_softmax(-1)
    statistics = {"lse": logits.logsumexp(-1), "entropy": -(log_p.exp() * log_p).sum(-1)}
    if problem.targets is not None:
        statistics["logprob"] = at_target(log_p, problem.targets)
    kl_log_p = student(problem.kl_temperature).log_softmax(-1)
    if problem.teacher is not None:
        teacher_logits = other(problem.teacher, problem.teacher_temperature)
        log_q = teacher_logits.log_softmax(-1)
        statistics |= divergences(kl_log_p, log_q, beta=problem.settings.jsd_beta)
        statistics["teacher_lse"] = teacher_logits.logsumexp(-1)
        statistics["teacher_entropy"] = -(log_q.exp() * log_q).sum(-1)
        agree = log_q.argmax(-1) == log_p.argmax(-1)
        statistics["top1_agree"] = agree.to(log_p.dtype)
        if problem.targets is not None:
            statistics["teacher_logprob"] = at_target(log_q, problem.targets)
    if problem.reference is not None:
        log_r = other(problem.reference, problem.kl_temperature).log_softmax(-1)
        statistics["ref_kl"] = kl_divergence(kl_log_p, log_r)
    return statistics


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats, (N,), of log-probabilities (N, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergences(log_p: Tensor, log_q: Tensor, *, beta: float) -> dict[str, Tensor]:
    """forward_kl, reverse_kl and jsd of student p and teacher q, (N,) each."""
    log_b = torch.tensor([beta, 1 - beta], dtype=log_p.dtype).log()
    log_m = torch.logaddexp(log_q + log_b[0], log_p + log_b[1])
    return {
        "forward_kl": kl_divergence(log_q, log_p),
        "reverse_kl": kl_divergence(log_p, log_q),
        "jsd": beta * kl_divergence(log_q, log_m) + (1 - beta) * kl_divergence(log_p, log_m),
    }


def check_dense(problem: Problem) -> None:
    """Refuses what the reference has not, and values that are impossible.

    Raises:
        ValueError: names the argument, what was found and expected.
    """
    settings = problem.settings
    for name in ("sparse_tolerance", "top_k", "group"):
        if getattr(settings, name):
            label = "process_group" if name == "group" else name
            raise ValueError(f"{label}: found a value, expected none with backend='reference'")
    if problem.weight_grad_out is not None:
        raise ValueError("weight_grad_out: found a value, expected None with backend='reference'")
    check_values(problem, settings.vocab_size)


def solve(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (), and every statistic (N,), with autograd through all of it."""
    check_dense(problem)
    active = problem.active
    # What is given for a row of weight zero may be anything, and 0 * NaN is NaN.
    inputs = {name: torch.where(active, value, 0) for name, value in problem.inputs.items()}
    with torch.autocast(problem.student.device.type, enabled=False):
        statistics = dense_statistics(problem)
        per_token = inputs["token_weights"] * problem.loss(statistics, inputs)
    return torch.where(active, per_token, 0).sum(), statistics


def hsd_loss(*args: Any, **options: Any) -> Any:
    """`fused_hsd_loss` with `backend="reference"`: same arguments, same result, dense."""
    from hsd_kernels.loss import fused_hsd_loss

    return fused_hsd_loss(*args, **options, backend="reference")
