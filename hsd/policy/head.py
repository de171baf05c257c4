"""The output head of any causal language model, and the hidden states that enter it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hsd.policy.packing import pack, pad_right
from hsd.policy.router import balance_losses

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    hidden = last_hidden(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
    found = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.logit_scale
    if head.logit_softcap is not None:
        found = head.logit_softcap * torch.tanh(found / head.logit_softcap)
    error = (found - logits).norm() / logits.norm()
    if not error < 1e-3:
        raise ValueError(
            f"model: found logits of {type(model).__name__} that differ from its head times its "
            f"hidden states by {error:.1%}, expected a plain linear head"
        )


def last_hidden(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """(B, L, D) last hidden states, after the final norm.

    Args:
        inputs: of the model's forward: input_ids (B, L), and what says where sequences end.
    """
    return _last_hidden(model, inputs, routed=False)[0]


def _last_hidden(model: PreTrainedModel, inputs: Mapping[str, Any], *, routed: bool) -> BaseOutput:
    if isinstance(model, FSDPModule):
        sharded: Any = model
        found: BaseOutput = sharded.sharded_hidden(inputs, routed=routed)
        return found
    return base_hidden(model, inputs, routed=routed)


def base_hidden(model: PreTrainedModel, inputs: Mapping[str, Any], *, routed: bool) -> BaseOutput:
    """`last_hidden`, past the hooks of a sharded model's root; and (B * L, E) router logits.

    Args:
        routed: whether the logits of each layer of experts are asked for.
    """
    options = {"output_router_logits": True} if routed else {}
    out: Any = model.base_model(**inputs, use_cache=False, **options)
    return out.last_hidden_state, tuple(out.router_logits) if routed else ()


def response_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    compute_dtype: torch.dtype,
    packed: bool = False,
) -> Tensor:
    """The hidden states that predict the response tokens, sequence after sequence.

    Args:
        packed: all sequences run as one row without padding, and each attends to itself alone; for
            models that `hsd.policy.attention.with_packing` has checked.

    Returns:
        (sum of response lengths, D) in the dtype of the head: float32, or the compute dtype where
        a sharded model has it gathered.
    """
    return routed_hidden(
        model, prompts, responses, compute_dtype=compute_dtype, packed=packed, balance=False
    )[0]


def routed_hidden(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    compute_dtype: torch.dtype,
    packed: bool,
    balance: bool,
) -> tuple[Tensor, Tensor | None]:
    """`response_hidden`, and if asked for the (B,) load-balancing loss of each sequence."""
    causal: Any = model
    weight: Tensor = causal.get_output_embeddings().weight
    device = weight.device
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    inputs, predicting = (_packed if packed else _padded)(sequences, prompts, device)
    # The weights of a sharded model are in the compute dtype already.
    with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != weight.dtype):
        hidden, router_logits = _last_hidden(model, inputs, routed=balance)
    losses = None
    if balance:
        owners = _owners(sequences, inputs)
        losses = balance_losses(router_logits, owners, len(sequences), model.config)
    return hidden[predicting].to(weight.dtype), losses


def _owners(sequences: Sequence[Sequence[int]], inputs: Mapping[str, Any]) -> Tensor:
    """(B * L,) the sequence that a token belongs to, -1 for padding."""
    ids: Tensor = inputs["input_ids"]
    numbers = torch.arange(len(sequences), device=ids.device)
    if "attention_mask" in inputs:
        return torch.where(inputs["attention_mask"].bool(), numbers[:, None], -1).flatten()
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    return numbers.repeat_interleave(lengths)


def _padded(
    sequences: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the model, and (B, L) bool, the positions before response tokens."""
    ids, mask = pad_right(sequences, device=device)
    start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[:, None]
    end = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)[:, None]
    position = torch.arange(ids.shape[1], device=device)
    predicting = (position >= start) & (position < end)
    return {"input_ids": ids, "attention_mask": mask}, predicting


def _packed(
    sequences: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the model, and (1, T) bool, the positions before response tokens."""
    ids, positions, offsets = pack(sequences, device=device)
    longest = max(len(sequence) for sequence in sequences)
    inputs = {
        "input_ids": ids,
        # Without a mask, transformers takes positions that start again for several sequences.
        "position_ids": positions,
        # Varlen kernels take these; from positions they would read them back in every layer.
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    predicting = [
        len(prompt) - 1 <= position < len(sequence) - 1
        for prompt, sequence in zip(prompts, sequences, strict=True)
        for position in range(len(sequence))
    ]
    return inputs, torch.tensor([predicting], device=device)
