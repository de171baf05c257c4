"""The models beside the policy: whose weights teach, and where the reference KL pulls to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hsd.distributed.fsdp import gathered_heads, local_part
from hsd.objective.config import ObjectiveConfig
from hsd.policy.head import OutputHead, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the loss needs of the models. Weights are float32, those of the averages too.

    Attributes:
        packed: micro-batches run as one row without padding; see `hsd.policy.attention`.
    """

    model: PreTrainedModel
    head: OutputHead
    teacher: PreTrainedModel | None  # may be the live model itself, or the initial one
    teacher_head: OutputHead | None
    initial: PreTrainedModel  # the reference: pi_0, or what it was refreshed to
    initial_head: OutputHead
    compute_dtype: torch.dtype
    packed: bool = False


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
    )


def after_update(policy: Policy, objective: ObjectiveConfig, *, updates: int) -> None:
    """Moves the teacher and the reference, where they move at all.

    Args:
        updates: optimiser updates that are done, from 1.
    """
    if objective.teacher == "ema" and policy.teacher is not None:
        move_toward(policy.teacher, policy.model, decay=objective.teacher_decay)
    if _refreshed(objective) and updates % objective.ref_refresh_every == 0:
        move_toward(policy.initial, policy.model, decay=objective.ref_refresh_decay)


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
