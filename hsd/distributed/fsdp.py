"""Sharded models: FSDP2 around the layers and the head of any causal language model.

A model is one FSDP tree: a unit per decoder layer, one for the output head (one for embedding and
head where they are tied, which keeps them tied), one for the embedding, and the root with the rest.
Losses hold normalisers of the whole step, so gradients are summed over ranks, never averaged.

The head does not run as a module: the fused loss reads its weight. `gathered_heads` unshards it
once for all micro-batches of an update; its gradient adds up in float32 there and is summed over
ranks by the backward of the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from hsd.distributed.config import ShardingConfig
from hsd.policy.adapters import merged
from hsd.policy.head import base_hidden
from hsd.policy.layers import checkpoint_activations, compile_layers, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_policy(
    model: PreTrainedModel,
    config: ShardingConfig,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    frozen: bool = False,
) -> None:
    """Shards a model in place; its weights may be on the meta device.

    Args:
        model: its weights are those that the optimiser updates, in float32, or they are frozen
            and adapters are those; a frozen one's may be of any dtype.
        mesh: one dimension, over the ranks that share the weights.
        compute_dtype: of gathered weights and of activations; gradients are summed in float32.
        frozen: a reference or a teacher, which needs no gradient.
    """
    sharded: Any = model
    if frozen:
        sharded.requires_grad_(False)
    if config.compile_layers:
        compile_layers(model)
    if config.activation_checkpointing and not frozen:
        checkpoint_activations(model)
    in_host_memory = config.offload_reference if frozen else config.offload == "all"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": (
            CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
            if in_host_memory
            else OffloadPolicy()
        ),
    }
    for layer in decoder_layers(model):
        fully_shard(layer, reshard_after_forward=True, **options)
    embedding, head = sharded.get_input_embeddings(), sharded.get_output_embeddings()
    tied = embedding.weight is head.weight
    fully_shard([embedding, head] if tied else head, reshard_after_forward=False, **options)
    if not tied:
        fully_shard(embedding, reshard_after_forward=True, **options)
        embedding.set_unshard_in_backward(False)  # its gradient does not depend on it
    # True: a frozen model has no backward that would shard the rest again.
    fully_shard(model, reshard_after_forward=True, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    # The loss wants hidden states: this way to them runs the root's hooks, as its forward does.
    sharded.sharded_hidden = MethodType(base_hidden, model)
    register_fsdp_forward_method(model, "sharded_hidden")


@contextmanager
def gathered_heads(model: PreTrainedModel, *others: PreTrainedModel | None) -> Iterator[None]:
    """Output heads are whole inside, as plain tensors in the compute dtype.

    Inside, the gradient of the policy's head stays on its rank until `synchronise_head`. Models
    that are not sharded are left as they are.

    Args:
        model: the policy.
        others: teachers and reference; may be the policy itself, or None.
    """
    models = {id(each): each for each in (model, *others) if each is not None}
    units = {key: _head_unit(each) for key, each in models.items()}
    for unit in units.values():
        if unit is not None:
            unit.unshard()
    own = units[id(model)]
    if own is not None:
        own.set_requires_gradient_sync(False, recurse=False)
        own.set_reshard_after_backward(False, recurse=False)
        _accumulate_in_float32(own)
    try:
        yield
    finally:
        for unit in units.values():
            if unit is not None:
                unit.reshard()


def synchronise_head(model: PreTrainedModel) -> None:
    """The next backward is the last of an update: it sums the head's gradient over the ranks."""
    unit = _head_unit(model)
    if unit is not None:
        unit.set_requires_gradient_sync(True, recurse=False)
        unit.set_reshard_after_backward(True, recurse=False)


def head_gradient(model: PreTrainedModel) -> Tensor | None:
    """(V, D) float32 accumulator of a gathered head; None if not sharded, or frozen by adapters.

    The loss adds to it in forward. As a gradient that autograd carries, each micro-batch's would be
    rounded to the compute dtype.
    """
    unit: Any = _head_unit(model)
    if unit is None or not unit.weight.requires_grad:
        return None
    weight: Tensor = unit.weight
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=torch.float32)
    return weight.grad


def full_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, one at a time; every rank must go through all.

    Adapters are merged into the weights that they adapt.
    """
    for name, parameter in merged(model, model.named_parameters()):
        whole = parameter.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


def whole_weights(model: torch.nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The whole state in host memory, by name, where it is kept; every rank must take part."""
    weights = {name: whole.cpu() for name, whole in full_parameters(model) if keep}
    if keep:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        weights |= {k: v for k, v in model.state_dict().items() if k not in parameters}
    return weights


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: a view of its shard, or the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest_count(count: int) -> int:
    """The largest of a number over the ranks."""
    found = torch.tensor(count)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def _head_unit(model: PreTrainedModel) -> FSDPModule | None:
    causal: Any = model
    head = causal.get_output_embeddings()
    return head if isinstance(head, FSDPModule) else None


def _accumulate_in_float32(unit: Any) -> None:
    for parameter in (unit.weight, unit.bias):
        if parameter is not None and parameter.requires_grad:
            parameter.grad_dtype = torch.float32
