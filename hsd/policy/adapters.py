"""Low-rank adapters (LoRA, arXiv 2106.09685; by peft) inside a policy whose own weights stay.

The model that is trained is then also the reference and the teacher: with its adapter switched off
it is pi_0, and an average of adapters is one more adapter, not one more model. What leaves the
trainer, to an engine or to a checkpoint for from_pretrained, is the merged model: each adapted
weight is W + (alpha / rank) B A.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hsd.policy.config import AdapterConfig
from hsd.rollout.protocol import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POLICY, TEACHER, REFERENCE = "policy", "teacher", "reference"
"""Names of adapters: the one that is trained, and those that follow it where they are asked for."""

OFF = "off"
"""In the place of a name: the model's own weights alone."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a model, which start equal.

    Attributes:
        seed: of the factors A; factors B start at zero: the model computes what it did.
        names: the policy's first; the others follow it.
    """

    config: AdapterConfig
    seed: int
    names: tuple[str, ...] = (POLICY,)


_LINEAR = (torch.nn.Linear, Conv1D)
_BASE = ".base_layer."  # peft's name for the layer that an adapted one wraps


def add_adapters(model: PreTrainedModel, adapters: Adapters) -> None:
    """Puts adapters into a model, in place; its own weights are frozen.

    The factors of a model on the meta device are there too; `initial_factor` has their values.

    Raises:
        ValueError: peft is not installed; or the target modules are none that can be adapted.
    """
    causal: Any = model
    # The loss reads the head's weight, and a tied embedding is the head: neither can be adapted.
    heads = (causal.get_input_embeddings(), causal.get_output_embeddings())
    config = adapters.config
    # By default not peft's "all-linear", which takes in experts and routers, whose weights are no
    # layers.
    targets = list(config.target_modules) or [
        name
        for name, module in causal.named_modules()
        if isinstance(module, _LINEAR) and module not in heads
    ]
    causal.requires_grad_(False)
    for name in adapters.names:
        _inject(model, config, name, targets)
        targets = list(_adapted_layers(model))  # an average is beside what it averages
    adapted = [each.get_base_layer() for each in _adapted_layers(model).values()]
    if any(each in heads or not isinstance(each, _LINEAR) for each in adapted):
        raise ValueError(
            f"adapter.target_modules: found {list(config.target_modules)}, expected linear layers "
            "between the embedding and the output head alone"
        )
    for layer in _adapted_layers(model).values():
        layer.set_adapter(POLICY)
    with torch.no_grad():
        for name, parameter in causal.named_parameters():
            if is_factor(name) and not parameter.is_meta:
                parameter.copy_(initial_factor(name, parameter.shape, seed=adapters.seed))


def _inject(model: PreTrainedModel, config: AdapterConfig, name: str, targets: list[str]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "adapter.rank: found peft not installed: pip install hsd-kernels[lora]"
        ) from None
    options: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0}
    lora = LoraConfig(target_modules=targets, **options)
    causal: Any = model
    on_meta = any(each.is_meta for each in causal.parameters())
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # Several adapters are meant; of GPT-2's layers, peft says what it does about them.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`|fan_in_fan")
            inject_adapter_in_model(lora, causal, adapter_name=name, low_cpu_mem_usage=on_meta)
    except (ValueError, RuntimeError) as error:
        chosen = list(config.target_modules) or "none"
        raise ValueError(f"adapter.target_modules: found {chosen} ({error})") from None


def initial_factor(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """(rank, in) or (out, rank) float32, what a factor starts as.

    A by its layer's name, uniform within 1 / sqrt(in) as peft draws it, so that whoever holds a
    part of a model has the same; B zero.

    Args:
        name: of the factor in the model's state.
    """
    layer, is_first, _ = name.partition(".lora_A.")
    if not is_first:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(stream_seed("adapter", seed, layer))
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def move_adapter(model: PreTrainedModel, name: str, *, decay: float) -> None:
    """adapter <- decay * adapter + (1 - decay) * the policy's, factor by factor, in place."""
    for layer in _adapted_layers(model).values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[name].weight.lerp_(factors[POLICY].weight, 1.0 - decay)


def has_adapters(model: torch.nn.Module) -> bool:
    return hasattr(model, "peft_config")


def name_in_files(name: str) -> str:
    """The name that a weight of an adapted model has in a model without adapters."""
    return name.replace(_BASE, ".")


def is_factor(name: str) -> bool:
    """Whether a name in a model's state is one of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def computing_with(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, an adapted model computes with another of its adapters, or with `OFF`.

    Without gradient: the adapter inside is not trained. A model without adapters is left as
    it is.
    """
    layers = [] if name == POLICY else list(_adapted_layers(model).values())
    for layer in layers:
        if name == OFF:
            layer.enable_adapters(False)
        else:
            layer.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_adapter(POLICY)
            layer.enable_adapters(True)


@torch.no_grad()
def merged(
    model: torch.nn.Module, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model without adapters that computes what this one does.

    One tensor at a time; without adapters, the tensors as they are.

    Args:
        named: of the model: its parameters, or its state.
    """
    layers = _adapted_layers(model)
    for name, value in named:
        owner, base, attribute = name.rpartition(_BASE)
        if base and owner in layers:
            if attribute == "weight":
                value = value + layers[owner].get_delta_weight(POLICY)
            yield f"{owner}.{attribute}", value
        elif not is_factor(name):
            yield name, value


def copy_without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model; of an adapted one, its own weights alone."""
    own: Any = copy.deepcopy(model)
    for name, layer in _adapted_layers(own).items():
        own.set_submodule(name, layer.get_base_layer())
    if has_adapters(own):
        del own.peft_config
    found: PreTrainedModel = own
    return found


def _adapted_layers(model: torch.nn.Module) -> dict[str, Any]:
    if not has_adapters(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
