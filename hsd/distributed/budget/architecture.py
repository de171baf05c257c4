"""The architecture of a recipe's model, without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import AutoConfig, AutoModelForCausalLM

from hsd.policy.adapters import Adapters, add_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SHIPPED = Path(__file__).with_name("architectures")


def load_architecture(name: str) -> PreTrainedConfig:
    """The configuration of `model.name`: shipped here by its last part (qwen3-8b.json), or found
    by transformers (a directory, or a name on the hub).

    Raises:
        ValueError: neither, or a model without layers.
    """
    found: PreTrainedConfig
    shipped = _SHIPPED / f"{Path(name).name.lower()}.json"
    if shipped.is_file() and not Path(name).is_dir():
        values: dict[str, Any] = json.loads(shipped.read_text(encoding="utf-8"))
        found = AutoConfig.for_model(values.pop("model_type"), **values)
        return found
    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        known = ", ".join(sorted(path.stem for path in _SHIPPED.glob("*.json")))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model.name: found {name!r}, expected a model with a configuration: a directory, a "
            f"hub name, or one of {known} ({reason})"
        ) from None
    if getattr(found, "num_hidden_layers", 1) < 1:
        raise ValueError(f"model.name: found {name!r}, a model of no layers, expected some")
    return found


def empty_model(
    architecture: PreTrainedConfig, *, dtype: torch.dtype, device: str = "meta"
) -> PreTrainedModel:
    """The model with weights of a dtype, dropout off."""
    causal: Any = AutoModelForCausalLM
    with torch.device(device):
        model: Any = causal.from_config(architecture, dtype=dtype)
    model.eval()
    found: PreTrainedModel = model
    return found


def add_fake_adapters(model: PreTrainedModel, adapters: Adapters) -> None:
    """As `add_adapters`, in a model of fake tensors, which peft cannot move between devices."""
    with unset_fake_temporarily():
        add_adapters(model, adapters)
    for module in cast(torch.nn.Module, model).modules():
        for name, factor in list(module.named_parameters(recurse=False)):
            if not isinstance(factor, FakeTensor):
                fake = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
                setattr(module, name, torch.nn.Parameter(fake, factor.requires_grad))


def kv_cache_bytes(architecture: PreTrainedConfig) -> int:
    """Of one token in bf16, keys and values of all layers."""
    heads: int = architecture.num_attention_heads
    size = getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    kv_heads = getattr(architecture, "num_key_value_heads", None) or heads
    return int(2 * architecture.num_hidden_layers * kv_heads * size * 2)
