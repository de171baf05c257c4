"""The output head of any causal language model, and the hidden states that enter it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hsd.policy.packing import pad_right
from hsd.policy.router import balance_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


BaseOutput: TypeAlias = tuple[Tensor, tuple[Tensor, ...]]
"""Hidden states, and the router logits of each layer that has experts."""


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """How logits follow from hidden states: softcap * tanh(scale * (x W^T + bias) / softcap)."""

    linear: torch.nn.Module
    logit_scale: float
    logit_softcap: float | None

    # Looked up each time: the parameters of a sharded model change as it is gathered.
    @property
    def weight(self) -> torch.nn.Parameter:  # (V, D)
        weight: torch.nn.Parameter = self.linear.get_parameter("weight")
        return weight

    @property
    def bias(self) -> torch.nn.Parameter | None:  # (V,)
        bias: torch.nn.Parameter | None = getattr(self.linear, "bias", None)
        return bias


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a model, checked against the model's own logits.

    Raises:
        ValueError: the model has no output embeddings, or does more between hidden states and
            logits than a head does.
    """
    causal: Any = model
    linear = causal.get_output_embeddings()
    if linear is None or not isinstance(getattr(linear, "weight", None), torch.nn.Parameter):
        raise ValueError(
            f"model: found {type(model).__name__} without an output head, "
            "expected a causal language model"
        )
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    head = OutputHead(
        linear=linear,
        logit_scale=scale,
        logit_softcap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
    )
    _check(model, head)
    return head


@torch.no_grad()
def _check(model: PreTrainedModel, head: OutputHead) -> None:
    rows = min(16, head.weight.shape[0])
    ids = torch.arange(rows, device=head.weight.device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = last_hidden(model, ids, torch.ones_like(ids))[0]
    found = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap is not None:
        found = head.logit_softcap * torch.tanh(found / head.logit_softcap)
    error = (found - logits).norm() / logits.norm()
    if not error < 1e-3:
        raise ValueError(
            f"model: found logits of {type(model).__name__} that differ from its head times its "
            f"hidden states by {error:.1%}, expected a plain linear head"
        )


def last_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D) last hidden states, after the final norm, of ids (B, L) and mask (B, L)."""
    return _last_hidden(model, ids, mask, routed=False)[0]


def _last_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, routed: bool) -> BaseOutput:
    if isinstance(model, FSDPModule):
        sharded: Any = model
        found: BaseOutput = sharded.sharded_hidden(ids, mask, routed=routed)
        return found
    return base_hidden(model, ids, mask, routed=routed)


def base_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, routed: bool) -> BaseOutput:
    """`last_hidden`, past the hooks of a sharded model's root; and (B * L, E) router logits.

    Args:
        routed: whether the logits of each layer of experts are asked for.
    """
    options = {"output_router_logits": True} if routed else {}
    out: Any = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return out.last_hidden_state, tuple(out.router_logits) if routed else ()


def response_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The hidden states that predict the response tokens, sequence after sequence.

    Returns:
        (sum of response lengths, D) in the dtype of the head: float32, or the compute dtype where
        a sharded model has it gathered.
    """
    return routed_hidden(model, prompts, responses, compute_dtype=compute_dtype, balance=False)[0]


def routed_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    compute_dtype: torch.dtype,
    balance: bool,
) -> tuple[Tensor, Tensor | None]:
    """`response_hidden`, and if asked for the (B,) load-balancing loss of each sequence."""
    causal: Any = model
    weight: Tensor = causal.get_output_embeddings().weight
    device = weight.device
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids, mask = pad_right(sequences, device=device)
    start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[:, None]
    length = torch.tensor([len(response) for response in responses], device=device)[:, None]
    position = torch.arange(ids.shape[1], device=device)
    predicting = (position >= start) & (position < start + length)
    # The weights of a sharded model are in the compute dtype already.
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != weight.dtype):
        hidden, router_logits = _last_hidden(model, ids, mask, routed=balance)
    losses = balance_losses(router_logits, mask, model.config) if balance else None
    return hidden[predicting].to(weight.dtype), losses
