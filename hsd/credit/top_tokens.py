"""The most likely tokens at chosen positions, for display."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

if TYPE_CHECKING:
    from hsd.policy.head import OutputHead

TOP = 5
_CHUNK_BYTES = 64 * 1024**2


@torch.no_grad()
def top_tokens(hidden: Tensor, head: OutputHead, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the TOP most likely tokens, in chunks of at most 64 MiB of logits.

    Args:
        hidden: (N, D) float32 last hidden states.
        head: of the model.
        temperature: of the softmax.

    Returns:
        (N, TOP) int64 and (N, TOP) float32, nats; fewer columns for a smaller vocabulary.
    """
    vocab_size = head.weight.shape[0]
    ids, logprobs = [], []
    for rows in torch.split(hidden, max(1, _CHUNK_BYTES // (4 * vocab_size))):
        logits = linear(rows, head.weight, head.bias).float() * head.logit_scale  # (n, V)
        if head.logit_softcap is not None:
            logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
        logits = logits / temperature
        best = logits.topk(min(TOP, vocab_size))
        ids.append(best.indices)
        logprobs.append(best.values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)
