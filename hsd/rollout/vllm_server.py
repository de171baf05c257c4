"""Rollouts by vLLM servers over HTTP: spread over replicas, retried, never of stale weights."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Rollout, Sampling, stop_token_ids
from hsd.rollout.replica import Replica
from hsd.rollout.server_launch import (
    logprobs_mode,
    server_command,
    server_environment,
    server_places,
)
from hsd.rollout.sharing import Sharing
from hsd.rollout.vllm_client import ServerLost, VllmClient
from hsd.rollout.weight_sync import NcclTransfer, WeightFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTEMPTS = 4
"""For one group of rollouts, each after its server was brought back."""


class VllmServerEngine:
    """Samples from one or more vLLM servers of this machine.

    Args:
        model, tokenizer: the policy; the servers start with its weights as they are now.
        compute_dtype: of the servers' weights and activations.
        sampling: of the run; how the servers must report log-probs follows from it.
        concurrent: groups of rollouts in flight at one time.
        world: each rank of the trainer has servers of its own, or with `config.shared` each
            machine; every rank then makes the same calls.

    Raises:
        EngineError: a server does not start, does not answer as it should, or reports log-probs
            that are not those of the policy that is sampled.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        compute_dtype: torch.dtype,
        sampling: Sampling,
        concurrent: int,
        world: World,
    ) -> None:
        self._config = config
        self._sharing = Sharing(world, shared=config.shared)
        self._stop_ids = stop_token_ids(model, tokenizer)
        self._concurrent = concurrent * (world.local_size if config.shared else 1)
        self._version = 0
        self._run = uuid.uuid4().hex[:8]  # labels of another run's weights are no labels of ours
        places = server_places(config, world)
        self._files = WeightFiles(
            tokenizer, dtype=compute_dtype, parent=config.sync_directory, world=world
        )
        self._free = threading.Condition()
        self._retries = 0
        self._replicas = [
            Replica(
                partial(
                    VllmClient,
                    request_timeout=config.request_timeout,
                    concurrent=self._concurrent,
                ),
                url=config.urls[place] if config.urls else None,
                command=partial(server_command, config, compute_dtype, sampling),
                environment=server_environment(config, place),
                log=self._files.folder / f"server-{place}.log",
                start_timeout=config.start_timeout,
                transfer=_nccl(config, model, compute_dtype),
            )
            for place in (places if self._sharing.acts else ())
        ]
        try:
            self._synchronise(model)
            self._sharing.do(partial(self._require_logprobs, sampling))
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> Sequence[Replica]:
        return self._replicas

    def update_weights(self, model: PreTrainedModel, *, version: int) -> None:
        self._version = version
        self._synchronise(model)

    def sleep(self) -> None:
        """Discards the servers' weights and caches until the next update, if engine.sleep."""
        if self._config.sleep:
            self._sharing.do(self._sleep)  # no rank goes on before its GPU's memory is free

    def _sleep(self) -> None:
        for replica in self._replicas:
            replica.sleep()

    def health(self) -> dict[str, float]:
        """Requests that were repeated since the start, each after its server was lost."""
        return {"engine_retries": float(self._retries)}

    def close(self) -> None:
        for replica in self._replicas:
            replica.close()
        self._files.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        sample = partial(self._groups, group_size=group_size, sampling=sampling)
        return self._sharing.map(list(zip(prompts, seeds, strict=True)), sample)

    def _groups(
        self,
        requests: Sequence[tuple[Sequence[int], int]],
        *,
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        if not requests:
            return []
        sample = partial(self._group, group_size=group_size, sampling=sampling)
        with ThreadPoolExecutor(max_workers=min(len(requests), self._concurrent)) as pool:
            futures = [pool.submit(sample, *each) for each in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _group(
        self, prompt: Sequence[int], seed: int, *, group_size: int, sampling: Sampling
    ) -> list[Rollout]:
        reason = ""
        for _ in range(_ATTEMPTS):
            replica = self._least_busy()
            life = replica.lives
            try:
                return replica.client.generate(
                    prompt,
                    seed=seed,
                    group_size=group_size,
                    sampling=sampling,
                    stop_ids=self._stop_ids,
                    label=self._label,
                    version=self._version,
                )
            except ServerLost as error:
                reason = str(error)
                with self._free:
                    self._retries += 1
                replica.recover(self._current_files, self._label, life=life, hung=error.hung)
            finally:
                with self._free:
                    replica.running -= 1
        raise EngineError(f"engine: {_ATTEMPTS} attempts at a group failed, the last: {reason}")

    def _least_busy(self) -> Replica:
        """A request that brings its server back counts, so that others prefer other servers."""
        with self._free:
            replica = min(self._replicas, key=lambda each: each.running)
            replica.running += 1
            return replica

    def _synchronise(self, model: PreTrainedModel) -> None:
        if self._config.weight_sync == "files" or self._files.current is None:
            self._files.write(model, self._version)
        self._sharing.do(self._synchronise_replicas)

    def _synchronise_replicas(self) -> None:
        files, label = self._current_files, self._label
        with ThreadPoolExecutor(max_workers=len(self._replicas)) as pool:
            for done in [pool.submit(each.synchronise, files, label) for each in self._replicas]:
                done.result()

    def _require_logprobs(self, sampling: Sampling) -> None:
        try:
            for replica in self._replicas:
                require_logprobs(replica.client, sampling)
        except ServerLost as error:
            raise EngineError(f"engine: a server was lost at its start: {error}") from error

    @property
    def _label(self) -> str:
        return f"{self._run}-{self._version}"

    @property
    def _current_files(self) -> Path:
        if self._files.current is None:
            raise EngineError("engine: no weights were written")
        return self._files.current


def require_logprobs(client: VllmClient, sampling: Sampling) -> None:
    """Refuses a server whose log-probs are not at the temperature, before top_p.

    Between temperature 1 and 2 the log-prob ratio of two tokens halves in the processed mode and
    stays in the raw one; the mode itself is asked for nowhere.

    Raises:
        EngineError: with the mode that is needed.
    """
    if sampling.temperature == 1 and sampling.top_p == 1:
        return  # both modes say the same
    prompt = (1, 2, 3, 5, 8, 13, 21, 34)
    at_one = client.top_logprobs(prompt, temperature=1.0)
    at_two = client.top_logprobs(prompt, temperature=2.0)
    shared = sorted(at_one.keys() & at_two.keys(), key=lambda token: at_one[token])
    spread = at_one[shared[-1]] - at_one[shared[0]] if shared else 0.0
    if spread < 1e-3:
        raise EngineError(f"engine: {client.url} reports no different log-probs on a fixed prompt")
    processed = at_two[shared[-1]] - at_two[shared[0]] < 0.75 * spread
    needed = logprobs_mode(sampling)
    found = "processed_logprobs" if processed else "raw_logprobs"
    if found != needed:
        raise EngineError(
            f"engine: {client.url} reports {found}, expected a server with --logprobs-mode "
            f"{needed} at temperature {sampling.temperature:g} and top_p {sampling.top_p:g}"
        )


def _nccl(
    config: EngineConfig, model: PreTrainedModel, dtype: torch.dtype
) -> Callable[[str, int], NcclTransfer] | None:
    if config.weight_sync == "files":
        return None
    return lambda url, workers: NcclTransfer(model, url=url, workers=workers, dtype=dtype)
