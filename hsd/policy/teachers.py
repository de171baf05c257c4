"""The models beside the policy: whose weights teach, and where the reference KL pulls to.

Of a policy with adapters they are the policy itself, computing with other adapters or with none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hsd.distributed.fsdp import gathered_heads, local_part
from hsd.objective.config import ObjectiveConfig
from hsd.policy.adapters import (
    OFF,
    POLICY,
    REFERENCE,
    TEACHER,
    Adapters,
    has_adapters,
    move_adapter,
)
from hsd.policy.config import AdapterConfig
from hsd.policy.head import OutputHead, output_head
from hsd.policy.router import router_coefficient

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the loss needs of the models. Weights are float32, those of the averages too.

    Attributes:
        packed: micro-batches run as one row without padding; see `hsd.policy.attention`.
        router_coef: of the load-balancing loss of a model with experts.
        teacher_adapter, initial_adapter: what those two compute with, where all three are one
            adapted model; `computing_with` switches to them.
    """

    model: PreTrainedModel
    head: OutputHead
    teacher: PreTrainedModel | None  # may be the live model itself, or the initial one
    teacher_head: OutputHead | None
    initial: PreTrainedModel  # the reference: pi_0, or what it was refreshed to
    initial_head: OutputHead
    compute_dtype: torch.dtype
    packed: bool = False
    router_coef: float = 0.0
    teacher_adapter: str = POLICY
    initial_adapter: str = POLICY


def make_policy(
    model: PreTrainedModel,
    objective: ObjectiveConfig,
    *,
    compute_dtype: torch.dtype,
    copy_of: Callable[[PreTrainedModel, bool], PreTrainedModel] | None = None,
) -> Policy:
    """A model with the copies of it that an objective asks for.

    Args:
        copy_of: gives a frozen model with a model's weights, which will move or not; a sharded
            model cannot be copied, only loaded again. Default: a deep copy.
    """
    copied = copy_of or _frozen
    head = _head(model)
    initial = copied(model, _refreshed(objective))
    teacher: PreTrainedModel | None = None
    if objective.teacher == "live":
        teacher = model
    elif objective.teacher == "ema" or (objective.teacher == "initial" and _refreshed(objective)):
        # It must not move along with the reference.
        teacher = copied(model, objective.teacher == "ema")
    elif objective.teacher == "initial":
        teacher = initial
    return Policy(
        model=model,
        head=head,
        teacher=teacher,
        teacher_head=None if teacher is None else _head(teacher),
        initial=initial,
        initial_head=_head(initial),
        compute_dtype=compute_dtype,
        router_coef=router_coefficient(model, objective.router_aux_coef),
    )


def adapters_for(config: AdapterConfig, objective: ObjectiveConfig, *, seed: int) -> Adapters:
    """The adapters of a policy: its own, and one more for each average that moves."""
    names = [POLICY]
    if objective.teacher == "ema":
        names.append(TEACHER)
    if _refreshed(objective):
        names.append(REFERENCE)
    return Adapters(config=config, seed=seed, names=tuple(names))


def make_adapted_policy(
    model: PreTrainedModel, objective: ObjectiveConfig, *, compute_dtype: torch.dtype
) -> Policy:
    """One model as the policy, its teacher and its reference.

    Args:
        model: with the adapters of `adapters_for`.
    """
    head = _head(model)
    initial_adapter = REFERENCE if _refreshed(objective) else OFF
    teacher_adapter = {"live": POLICY, "ema": TEACHER}.get(objective.teacher, OFF)
    taught = objective.teacher != "none"
    return Policy(
        model=model,
        head=head,
        teacher=model if taught else None,
        teacher_head=head if taught else None,
        initial=model,
        initial_head=head,
        compute_dtype=compute_dtype,
        router_coef=router_coefficient(model, objective.router_aux_coef),
        teacher_adapter=teacher_adapter,
        initial_adapter=initial_adapter,
    )


def after_update(policy: Policy, objective: ObjectiveConfig, *, updates: int) -> None:
    """Moves the teacher and the reference, where they move at all.

    Args:
        updates: optimiser updates that are done, from 1.
    """
    moves = []
    if objective.teacher == "ema" and policy.teacher is not None:
        moves.append((policy.teacher, policy.teacher_adapter, objective.teacher_decay))
    if _refreshed(objective) and updates % objective.ref_refresh_every == 0:
        moves.append((policy.initial, policy.initial_adapter, objective.ref_refresh_decay))
    for average, adapter, decay in moves:
        if has_adapters(policy.model):
            move_adapter(policy.model, adapter, decay=decay)
        else:
            move_toward(average, policy.model, decay=decay)


@torch.no_grad()
def move_toward(average: PreTrainedModel, model: PreTrainedModel, *, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place; shard by shard if sharded."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        own = local_part(old)
        own.lerp_(local_part(new).to(own.device), 1.0 - decay)  # one of them may be offloaded


def _refreshed(objective: ObjectiveConfig) -> bool:
    return objective.ref_refresh_every > 0


def _frozen(model: PreTrainedModel, moves: bool) -> PreTrainedModel:
    return copy.deepcopy(model).requires_grad_(False)


def _head(model: PreTrainedModel) -> OutputHead:
    with gathered_heads(model):
        return output_head(model)
