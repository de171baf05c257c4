"""The load-balancing loss of mixture-of-experts models, sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def router_coefficient(model: PreTrainedModel, chosen: float | None) -> float:
    """The factor of the load-balancing loss; 0 where there is none.

    Args:
        chosen: None for the model's own, as transformers reads its configuration:
            router_aux_loss_coef where output_router_logits is true.

    Raises:
        ValueError: one was chosen for a model that has no such loss.
    """
    config: Any = model.config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", None)
    if chosen and own is None:
        raise ValueError(
            f"objective.router_aux_coef: found {chosen}, expected 0 or none for "
            f"{type(model).__name__}, whose configuration has no router_aux_loss_coef"
        )
    if chosen is None:
        return float(own or 0.0) if getattr(config, "output_router_logits", False) else 0.0
    return chosen


def balance_losses(
    router_logits: Sequence[Tensor], owners: Tensor, count: int, config: Any
) -> Tensor:
    """(B,) the load-balancing loss of each sequence, over its tokens in all layers.

    E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, equation 4, by transformers): how often
    a token chose expert e, times its mean probability. A product of means, it is no sum over
    tokens: over a micro-batch it would depend on what else lies in it. Over a sequence (as in
    DeepSeek-V3, arXiv 2412.19437, equation 17) it does not.

    Args:
        router_logits: (T, E) of each layer that has experts.
        owners: (T,) the sequence that a token belongs to, -1 for padding.
        count: B, sequences.
        config: of the model, or of its text model.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or text.num_local_experts
    losses = []
    for sequence in range(count):
        own = owners == sequence
        tokens: Any = tuple(logits.reshape(len(owners), -1)[own] for logits in router_logits)
        loss: Any = load_balancing_loss_func(tokens, experts, text.num_experts_per_tok)
        losses.append(loss)
    return torch.stack(losses)
