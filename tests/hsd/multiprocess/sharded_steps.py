"""Steps of training on given rows, for test_sharding.py and the ranks that it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from sharding_cases import Case, Groups
from torch import Tensor
from torch.distributed.tensor import DTensor

from hsd.distributed.process import World
from hsd.objective.normalisation import NORMALISATIONS, StepTotals
from hsd.objective.step import accumulate_gradients
from hsd.policy.optimizer import adamw, clipped_step
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy, after_update
from hsd.rollout.weight_sync import whole_tensors

OnStep = Callable[[int, str, Tensor], None]


def flat(model: torch.nn.Module) -> Tensor:
    """All parameters of a model, adapters among them, whole and in one vector."""
    return torch.cat([_whole(each.detach()).flatten() for each in model.parameters()]).clone()


def flat_gradient(model: torch.nn.Module) -> Tensor:
    parts = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        parts.append(_whole(gradient).flatten())
    return torch.cat(parts)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_steps(
    case: Case, policy: Policy, steps: Sequence[Groups], world: World, on_step: OnStep
) -> None:
    """Trains on the groups of every step that are this rank's; reports gradient and change.

    And in the end the weights as an engine gets them.
    """
    before = flat(policy.model)
    parameters = list(policy.model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=1.0)
    if case.optimizer == "adamw":
        on_host = case.sharding.offload == "optimizer"
        optimizer = adamw(parameters, 1.0, on_host=on_host)
        optimizer.param_groups[0]["eps"] = case.eps
    rate = 1.0 if case.optimizer == "sgd" else 1e-3
    mine = case.shares[world.rank] if world.size > 1 else sum(case.shares, ())
    for number, groups in enumerate(steps):
        rows = normalised([groups[question] for question in mine], case.normalisation, world)
        accumulate_gradients(
            policy,
            rows,
            case.objective,
            micro_batch_tokens=case.micro_batch_tokens,
            temperature=1.0,
        )
        on_step(number, "gradient", flat_gradient(policy.model))
        clipped_step(optimizer, parameters, learning_rate=rate, max_grad_norm=case.max_grad_norm)
        after_update(policy, case.objective, updates=number + 1)
        on_step(number, "change", flat(policy.model) - before)
    sent = dict(whole_tensors(policy.model, torch.float32, keep_head=False))
    on_step(len(steps), "sent", torch.cat([each.flatten() for each in sent.values()]))


def normalised(groups: Groups, name: str, world: World) -> list[TrainingRow]:
    """Rows with the weights of a normalisation, whose totals are those of all ranks."""
    tokens = sum(len(row.response) for group in groups for row in group)
    counts = world.sum_(torch.tensor([len(groups), tokens])).tolist()
    totals = StepTotals(questions=counts[0], tokens=counts[1], max_new_tokens=100)
    rows = []
    for group in groups:
        shares = NORMALISATIONS[name]([len(row.response) for row in group], totals)
        for row, share in zip(group, shares, strict=True):
            rows.append(replace(row, weights=(share,) * len(row.response)))
    return rows
