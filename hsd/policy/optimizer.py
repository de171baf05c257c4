"""AdamW on float32 weights, its learning rate, and the clipped step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hsd.config import OptimizerConfig
from hsd.distributed.fsdp import local_part
from hsd.policy.offload import HostAdamW


def adamw(
    parameters: Iterable[torch.nn.Parameter], learning_rate: float, *, on_host: bool = False
) -> torch.optim.AdamW:
    """The paper's: betas .9 and .95, eps 1e-8, no weight decay.

    Args:
        parameters: those that need no gradient are left out.
        on_host: states in host memory, and the step there.
    """
    kind = HostAdamW if on_host else torch.optim.AdamW
    trained = [each for each in parameters if each.requires_grad]
    return kind(
        trained, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )


def learning_rate(config: OptimizerConfig, *, step: int, steps: int) -> float:
    """The rate of update `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * (1.0 - 0.9 * done)


def clipped_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """One update at a rate; returns the gradient's norm before clipping.

    Raises:
        FloatingPointError: the gradient is not finite; the weights are as they were.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = total_norm(gradients)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient: found norm {norm.item()}, expected a finite one")
    scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local_part(gradient).mul_(scale.to(gradient.device))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """() the norm of all gradients as one vector; of sharded ones, of the whole, on every rank."""
    norm = torch.nn.utils.get_total_norm([local_part(gradient) for gradient in gradients])
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        squared = norm.square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
    return norm
