"""What is done to the decoder layers of a model, sharded or not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers of a model, in order: the modules that transformers would not split.

    Raises:
        ValueError: the model names none.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"model: found {type(model).__name__} without decoder layers by the names "
            f"{sorted(names)}, expected some"
        )
    return layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Each layer keeps its input alone and runs again in backward.

    The forward is wrapped, not the module: hooks stay outside, so FSDP gathers a layer once for
    both, and the names of weights stay. (transformers' own checkpointing needs training mode, which
    would switch dropout on.)
    """
    for layer in decoder_layers(model):
        # No layer draws random numbers: dropout is off.
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` of each layer's forward; hooks stay outside."""
    for layer in decoder_layers(model):
        # Of the class's: a deep copy of the model then runs its own layers, not these.
        layer.forward = partial(torch.compile(type(layer).forward), layer)
