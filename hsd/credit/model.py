"""Log-probs, KL and entropies of tokens, without gradient and without N x V logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hsd.credit.records import ContextCredit, Floats, TopTokens
from hsd.policy.head import OutputHead, response_hidden
from hsd_kernels import fused_hsd_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hsd_kernels import TokenStatistics

TOP = 5
"""Most likely tokens that are kept at each position."""


class StudentView(NamedTuple):
    """The plain model's view of a rollout of n tokens; nats."""

    logprob: Floats  # (n,)
    entropy: Floats  # (n,)
    top: TopTokens


@dataclass(frozen=True, kw_only=True)
class CreditModel:
    """The model that is student and teacher, and how it is run.

    Attributes:
        temperature: of all log-probs, KLs and entropies: the rollouts'.
        micro_batch_tokens: padded tokens of one forward pass.
        max_chunk_bytes: of logits held at one time; None is the library's default.
    """

    model: PreTrainedModel
    head: OutputHead
    tokenizer: PreTrainedTokenizerBase
    compute_dtype: torch.dtype
    temperature: float
    micro_batch_tokens: int
    max_chunk_bytes: int | None = None

    @torch.no_grad()
    def hidden(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Per rollout the (n, D) float32 hidden states that predict its tokens."""
        hidden = response_hidden(self.model, prompts, responses, compute_dtype=self.compute_dtype)
        return list(torch.split(hidden, [len(response) for response in responses]))

    def student(
        self, hidden: Sequence[Tensor], responses: Sequence[Sequence[int]]
    ) -> list[StudentView]:
        """The view of the plain prompt, from its hidden states (n, D)."""
        stats = self._statistics(hidden, None, responses)
        logprob, entropy = _per_rollout(stats.logprob, hidden), _per_rollout(stats.entropy, hidden)
        tops = _tops(stats.top_ids, stats.top_logprobs, hidden)
        return [StudentView(*view) for view in zip(logprob, entropy, tops, strict=True)]

    def teacher(
        self,
        student_hidden: Sequence[Tensor],
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
    ) -> list[ContextCredit]:
        """The view of the teacher's prompts, against the student's hidden states (n, D)."""
        hidden = self.hidden(prompts, responses)
        stats = self._statistics(student_hidden, hidden, responses)
        views = zip(
            _per_rollout(stats.logprob, hidden),
            _per_rollout(stats.teacher_logprob, hidden),
            _per_rollout(stats.kl, hidden),
            _per_rollout(stats.teacher_entropy, hidden),
            _tops(stats.teacher_top_ids, stats.teacher_top_logprobs, hidden),
            strict=True,
        )
        return [
            ContextCredit(
                logprob=log_q,
                credit=log_q - log_p,
                kl=kl,
                entropy=entropy,
                top=top,
            )
            for log_p, log_q, kl, entropy, top in views
        ]

    @torch.no_grad()
    def _statistics(
        self,
        student_hidden: Sequence[Tensor],
        teacher_hidden: Sequence[Tensor] | None,
        responses: Sequence[Sequence[int]],
    ) -> TokenStatistics:
        return fused_hsd_loss(
            torch.cat(list(student_hidden)),  # (N, D)
            None if teacher_hidden is None else torch.cat(list(teacher_hidden)),  # (N, D)
            self.head.weight.detach(),  # (V, D)
            bias=None if self.head.bias is None else self.head.bias.detach(),
            targets=torch.tensor([token for response in responses for token in response]),
            entropy_coef=1.0 if teacher_hidden is None else 0.0,  # a loss needs some term
            temperature=self.temperature,
            logit_scale=self.head.logit_scale,
            logit_softcap=self.head.logit_softcap,
            max_chunk_bytes=self.max_chunk_bytes,
            top_k=min(TOP, self.head.weight.shape[0]),
        ).stats


def _per_rollout(values: Tensor | None, hidden: Sequence[Tensor]) -> list[Floats]:
    """(N,) of one statistic as one (n,) float64 per rollout."""
    if values is None:
        raise RuntimeError("the loss left out a statistic whose inputs it was given")
    parts = torch.split(values.double().cpu(), [len(rows) for rows in hidden])
    return [np.asarray(part.numpy(), dtype=np.float64) for part in parts]


def _tops(
    token_ids: Tensor | None, logprobs: Tensor | None, hidden: Sequence[Tensor]
) -> list[TopTokens]:
    """(N, k) most likely tokens, one record per rollout."""
    if token_ids is None or logprobs is None:
        raise RuntimeError("the loss left out the most likely tokens it was asked for")
    lengths = [len(rows) for rows in hidden]
    return [
        TopTokens(token_ids=ids.numpy(), logprobs=values.numpy())
        for ids, values in zip(
            torch.split(token_ids.cpu(), lengths),
            torch.split(logprobs.double().cpu(), lengths),
            strict=True,
        )
    ]
