"""Which engine a run samples with, and the check that it samples from the trainer's policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hsd.distributed.fsdp import gathered_heads
from hsd.distributed.process import World
from hsd.policy.head import response_hidden
from hsd.policy.precision import compute_dtype
from hsd.policy.teachers import Policy
from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import EngineError, RolloutEngine, Sampling, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hsd.config import Config

_CHECKED_ROLLOUTS = 8
_CHECKED_TOKENS = 16


def make_engine(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sampling: Sampling,
    world: World,
) -> RolloutEngine:
    """The engine that `config.engine` names, with the model's weights as they are now.

    Raises:
        EngineError: it cannot be started, or is not of use here.
        ValueError: vLLM is not installed where it is to be started.
    """
    dtype = compute_dtype(config.model.compute_dtype)
    rollout, engine = config.rollout, config.engine
    if engine.kind == "hf":
        return HfEngine(model, tokenizer, compute_dtype=dtype, batch_rows=rollout.batch_rows)
    # Imported where they are chosen: neither HTTP nor vLLM is needed for the default.
    if engine.kind == "vllm":
        from hsd.rollout.server_launch import require_vllm
        from hsd.rollout.vllm_server import VllmServerEngine

        require_vllm(engine)
        return VllmServerEngine(
            engine,
            model,
            tokenizer,
            compute_dtype=dtype,
            sampling=sampling,
            concurrent=max(1, rollout.batch_rows // rollout.group_size),
            world=world,
        )
    from hsd.rollout.vllm_colocated import VllmColocatedEngine

    return VllmColocatedEngine(
        engine,
        model,
        tokenizer,
        compute_dtype=dtype,
        sampling=sampling,
        seed=config.seed,
        world=world,
    )


def make_lone_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """The engine that `config.engine` names, for one process that samples from one set of weights
    and reads no log-probs.

    Raises:
        EngineError: see `make_engine`.
    """
    # Nothing is updated in turns with it, and no other rank asks; servers may be in either mode.
    alone = dataclasses.replace(config.engine, sleep=False, shared=False)
    return make_engine(
        dataclasses.replace(config, engine=alone),
        model,
        tokenizer,
        sampling=Sampling(max_new_tokens=config.rollout.max_new_tokens),
        world=World(rank=0, size=1),
    )


@torch.no_grad()
def check_engine(
    engine: RolloutEngine,
    policy: Policy,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    tolerance: float,
) -> float:
    """Compares the engine's log-probs with the trainer's on rollouts of one prompt.

    Args:
        tolerance: nats, of the mean difference over their tokens.

    Returns:
        the mean absolute difference, nats.

    Raises:
        EngineError: it is beyond the tolerance: other weights, another temperature, another
            tokenizer's ids, or too coarse a precision.
    """
    short = Sampling(
        max_new_tokens=min(_CHECKED_TOKENS, sampling.max_new_tokens),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
    )
    (group,) = engine.generate(
        [prompt],
        seeds=[stream_seed("engine check")],
        group_size=_CHECKED_ROLLOUTS,
        sampling=short,
    )
    responses = [rollout.token_ids for rollout in group]
    head = policy.head
    hidden = response_hidden(
        policy.model, [prompt] * len(group), responses, compute_dtype=policy.compute_dtype
    )  # (N, D)
    with gathered_heads(policy.model):
        bias = None if head.bias is None else head.bias.float()
        logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), bias)
    logits = logits * head.logit_scale
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    targets = torch.tensor([token for each in responses for token in each], device=logits.device)
    logprobs = (logits / sampling.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    found = torch.tensor([value for each in group for value in each.logprobs])
    gap = float((found.to(logprobs) - logprobs).abs().mean())
    if not gap <= tolerance:
        raise EngineError(
            f"engine: found log-probs {gap:.3g} nats from the trainer's on a fixed prompt, in the "
            f"mean, expected at most engine.tolerance, {tolerance:g}"
        )
    return gap
