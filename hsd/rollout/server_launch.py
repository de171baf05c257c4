"""How the vLLM servers of a machine are started: their words, variables and GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Sampling


def server_command(
    config: EngineConfig, dtype: torch.dtype, sampling: Sampling, files: Path, port: int
) -> list[str]:
    """The words that start a server."""
    words = [
        str(config.python or sys.executable),
        *("-m", "vllm.entrypoints.cli.main", "serve", str(files)),
        # The development endpoints run methods of whoever asks.
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", str(dtype).removeprefix("torch.")),
        *("--logprobs-mode", logprobs_mode(sampling)),
        *("--generation-config", "vllm"),
        "--enable-scale-out",
    ]
    if not torch.cuda.is_available():
        # A prompt that is computed in parts moves its request's generator back, which one of the
        # CPU cannot do: vLLM 0.32 ends.
        words.append("--no-enable-chunked-prefill")
    if config.tensor_parallel > 1:
        words += ["--tensor-parallel-size", str(config.tensor_parallel)]
    if config.sleep:
        words.append("--enable-sleep-mode")
    if config.weight_sync == "nccl":
        words += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    return [*words, *config.arguments]


def require_vllm(config: EngineConfig) -> None:
    """Looks for vLLM where the trainer would start it, before anything is.

    Raises:
        ValueError: the Python cannot be run, or does not find vLLM.
    """
    if config.urls:
        return
    python = str(config.python or sys.executable)
    words = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    expected = "the Python of an environment with vLLM, such as `make test-vllm` installs"
    try:
        found = subprocess.run(
            [python, "-c", words],
            env={**os.environ, **config.environment},
            capture_output=True,
            check=False,
        )
    except OSError as error:
        raise ValueError(
            f"engine.python: found {python!r} ({error.strerror}), expected {expected}"
        ) from None
    if found.returncode:
        raise ValueError(f"engine.python: found {python!r} without vLLM, expected {expected}")


def server_environment(config: EngineConfig, place: int) -> dict[str, str]:
    """Variables of the server in a place among those of the machine."""
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", **config.environment}
    if config.devices:
        own["CUDA_VISIBLE_DEVICES"] = config.devices[place]
    elif torch.cuda.is_available():
        size = config.tensor_parallel
        own["CUDA_VISIBLE_DEVICES"] = ",".join(_devices()[place * size : (place + 1) * size])
    return own


def server_places(config: EngineConfig, world: World) -> list[int]:
    """The servers of a rank among those of the machine; of the first, where they are shared.

    Raises:
        EngineError: they are too few or too many for its ranks or GPUs.
    """
    rank, ranks = (0, 1) if config.shared else (world.local_rank, world.local_size)
    if config.urls:
        found = list(range(len(config.urls)))[rank::ranks]
        if not found:
            raise EngineError(
                f"engine.urls: found {len(config.urls)} for {ranks} ranks, expected one each, or "
                "engine.shared"
            )
        return found
    count, size = config.replicas, config.tensor_parallel
    if config.devices:
        if len(config.devices) < ranks * count:
            raise EngineError(
                f"engine.devices: found {len(config.devices)}, expected one for each server"
            )
    elif config.shared and config.sleep and count * size != world.local_size:
        raise EngineError(
            f"engine.tensor_parallel: found {count} x {size} GPUs for servers that sleep beside "
            f"{world.local_size} ranks, expected engine.replicas x engine.tensor_parallel to be "
            "the ranks of the machine, or engine.devices"
        )
    elif torch.cuda.is_available() and ranks * count * size > len(_devices()):
        raise EngineError(
            f"engine.tensor_parallel: found {ranks * count} servers of {size} GPUs on a machine "
            f"with {len(_devices())}, expected no more than there are, or engine.devices"
        )
    return [rank * count + index for index in range(count)]


def _devices() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))


def logprobs_mode(sampling: Sampling) -> str:
    """The server's mode in which it reports log-probs at the temperature, before top_p."""
    return "raw_logprobs" if sampling.temperature == 1 else "processed_logprobs"
