"""Rollouts by vLLM in the trainer's process, on the trainer's own GPU, in turns with the update.

Written against the documented interface of vLLM 0.32 and tested against a stand-in for it; it has
not been tried on hardware.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Rollout, Sampling, stop_token_ids
from hsd.rollout.weight_sync import WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VllmColocatedEngine:
    """Holds a `vllm.LLM`, whose weights and cache are discarded while the policy is updated.

    Args:
        config: its `arguments` are keyword arguments of LLM, as "key=JSON value".
        model, tokenizer: the policy.
        compute_dtype: of the engine's weights and activations.
        sampling: of the run.

    Raises:
        EngineError: vLLM is not installed here.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compute_dtype: torch.dtype,
        sampling: Sampling,
        seed: int,
        world: World,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise EngineError(f"engine.kind: 'vllm_colocated' needs vLLM here: {error}") from None
        self._vllm: Any = vllm
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._version = 0
        self._asleep = False
        self._files = WeightFiles(
            tokenizer, dtype=compute_dtype, parent=config.sync_directory, world=world
        )
        try:
            self._llm: Any = self._vllm.LLM(
                model=str(self._files.write(model, 0)),
                dtype=str(compute_dtype).removeprefix("torch."),
                logprobs_mode="raw_logprobs" if sampling.temperature == 1 else "processed_logprobs",
                generation_config="vllm",
                enable_sleep_mode=True,
                seed=seed,
                **dict(map(_keyword, config.arguments)),
            )
        except BaseException:
            self._files.close()
            raise

    def update_weights(self, model: PreTrainedModel, *, version: int) -> None:
        """Wakes the weights, loads the new ones, then wakes the cache: never all at a time."""
        path = self._files.write(model, version)
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
        self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise EngineError("engine: the prefix cache could not be reset after new weights")
        self._version = version

    def sleep(self) -> None:
        self._llm.sleep(level=2)
        self._asleep = True

    def health(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._llm = None
        self._files.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        if self._asleep:
            raise EngineError("engine: asked for rollouts without weights since it went to sleep")
        if not prompts:
            return []
        requests = [
            self._vllm.SamplingParams(
                n=group_size,
                seed=seed % 2**62,  # the rollouts of a group are given the next ones
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                logprobs=0,
                stop_token_ids=self._stop_ids,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts], requests, use_tqdm=False
        )
        return [[self._rollout(each) for each in output.outputs] for output in outputs]

    def _rollout(self, output: Any) -> Rollout:
        tokens = tuple(output.token_ids)
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"engine: found a rollout that ended by {output.finish_reason!r}")
        pairs = zip(tokens, output.logprobs, strict=True)
        return Rollout(
            token_ids=tokens,
            logprobs=tuple(float(listed[token].logprob) for token, listed in pairs),
            loss_mask=(True,) * len(tokens),
            finish_reason=output.finish_reason,
            policy_version=self._version,
        )


def _keyword(argument: str) -> tuple[str, Any]:
    key, _, value = argument.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        raise EngineError(
            f"engine.arguments: found {argument!r}, expected key=JSON value"
        ) from None
