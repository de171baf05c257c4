"""Rollouts by transformers' generate, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from hsd.distributed.fsdp import full_parameters
from hsd.policy.adapters import copy_without_adapters
from hsd.rollout.protocol import Rollout, Sampling, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class HfEngine:
    """Holds a copy of the policy in the compute dtype, which each weight update overwrites.

    Args:
        model: the policy.
        tokenizer: names the tokens that end a response, beside the model's generation config.
        compute_dtype: of weights and activations in generation.
        batch_rows: rollouts that are generated at one time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compute_dtype: torch.dtype,
        batch_rows: int,
    ) -> None:
        own: Any = copy_without_adapters(model)
        self._model: Any = own.to(compute_dtype).requires_grad_(False)
        if getattr(own.config, "output_router_logits", False):
            # For a loss that generation has no use for, and that fails beside a cache.
            own.config.output_router_logits = False
        self._stop_ids = frozenset(stop_token_ids(model, tokenizer))
        self._batch_rows = batch_rows
        self._version = 0
        # The model's own defaults (top_k, repetition penalty) would change the policy unseen.
        pad = tokenizer.pad_token_id
        defaults: Any = GenerationConfig
        self._model.generation_config = defaults(
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=min(self._stop_ids) if pad is None else pad,
        )

    @torch.no_grad()
    def update_weights(self, model: PreTrainedModel, *, version: int) -> None:
        whole = full_parameters(model)
        for own, (_, new) in zip(self._model.parameters(), whole, strict=True):
            own.copy_(new)
        self._version = version

    def sleep(self) -> None:
        """Keeps its copy of the weights: it shares the trainer's device and memory."""

    def health(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Has started nothing."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        if not prompts:
            return []
        size = max(1, self._batch_rows // group_size)
        batches = range(0, len(prompts), size)
        groups: list[list[Rollout]] = []
        for start in batches:
            chosen = slice(start, start + size)
            groups += self._batch(prompts[chosen], seeds[chosen], group_size, sampling)
        return groups

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        device = self._model.device
        ids, mask = _pad_left(prompts)
        ids, mask = ids.to(device), mask.to(device)
        uniform = torch.cat([_uniform(s, group_size, sampling.max_new_tokens) for s in seeds])
        sampler = Sampler(uniform.to(device), sampling)
        options: dict[str, Any] = {}
        cache = self._shared_prefix(ids, mask)
        if cache is not None:
            cache.batch_repeat_interleave(group_size)
            options["past_key_values"] = cache
        sequences = self._model.generate(
            input_ids=ids.repeat_interleave(group_size, 0),
            attention_mask=mask.repeat_interleave(group_size, 0),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the sampler leaves one token to choose
            logits_processor=LogitsProcessorList([sampler]),
            **options,
        )
        responses = sequences[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        rollouts = [self._rollout(*pair) for pair in zip(responses, logprobs, strict=True)]
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def _shared_prefix(self, ids: Tensor, mask: Tensor) -> DynamicCache | None:
        """Keys and values of each prompt but its last token, computed once for its whole group."""
        if ids.shape[1] < 2 or not bool(mask[:, -2].all()):
            return None
        cache = DynamicCache(config=self._model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
        filled = self._model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        shared = getattr(filled, "past_key_values", None)  # a recurrent model has none
        return shared if isinstance(shared, DynamicCache) else None

    def _rollout(self, tokens: list[int], logprobs: list[float]) -> Rollout:
        ends = [i for i, token in enumerate(tokens) if token in self._stop_ids]
        length = ends[0] + 1 if ends else len(tokens)
        return Rollout(
            token_ids=tuple(tokens[:length]),
            logprobs=tuple(logprobs[:length]),
            loss_mask=(True,) * length,
            finish_reason="stop" if ends else "length",
            policy_version=self._version,
        )


class Sampler(LogitsProcessor):
    """Draws each token from a uniform number drawn beforehand, and leaves only it to choose.

    So a rollout depends on its seed and not on its neighbours in the batch, the log-prob of what
    was drawn is at hand, and no random numbers are spent on the whole vocabulary.

    Args:
        uniform: (B, max_new_tokens) in [0, 1).
        sampling: temperature and top_p.
    """

    def __init__(self, uniform: Tensor, sampling: Sampling) -> None:
        self._uniform = uniform
        self._sampling = sampling
        self.logprobs: list[Tensor] = []  # (B,) per step, at the temperature, before top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logprobs)
        greedy = self._sampling.temperature == 0
        logits = scores.float() / (1.0 if greedy else self._sampling.temperature)  # (B, V)
        if greedy:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = _invert(logits, self._uniform[:, step : step + 1], self._sampling.top_p)
        logprob = logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)
        self.logprobs.append(logprob.squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def _invert(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """(B, 1) the token at which the cumulative distribution of (B, V) logits passes `uniform`."""
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered = probabilities.sort(-1, descending=True)
        before = ordered.values.cumsum(-1) - ordered.values
        kept = ordered.values.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # right=True never lands on a token of probability zero; a sum rounded up could leave the range.
    token = torch.searchsorted(cumulative, uniform * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)
    return torch.minimum(token, last)


def _uniform(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((rows, columns), generator=generator)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask
