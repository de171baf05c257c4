"""The shipped model, and a vLLM of another environment that serves it on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hsd.distributed.process import World
from hsd.policy.load import load_policy
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import Sampling
from hsd.rollout.vllm_server import VllmServerEngine

MODEL = "smollm2-135m-instruct"


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def vllm_options() -> dict[str, Any]:
    """Of EngineConfig: the environment with vLLM, which `make test-vllm` names, and its limits."""
    path = os.environ.get("HSD_VLLM_PYTHON")
    if not path or not Path(path).exists():
        pytest.fail(f"HSD_VLLM_PYTHON: found {path!r}, expected a Python with vLLM; make test-vllm")
    return {
        "kind": "vllm",
        "python": Path(path),
        "arguments": ("--max-model-len", "1024", "--enforce-eager"),
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    }


@pytest.fixture
def policy() -> Policy:
    return Policy(*load_policy(MODEL))


@pytest.fixture
def start_engine(
    vllm_options: dict[str, Any], policy: Policy
) -> Iterator[Callable[..., VllmServerEngine]]:
    """Starts servers of the policy; they end with the test."""
    started = []

    def start(sampling: Sampling, *, dtype: torch.dtype, **options: Any) -> VllmServerEngine:
        config = EngineConfig(**vllm_options, **options)
        engine = VllmServerEngine(
            config,
            policy.model,
            policy.tokenizer,
            compute_dtype=dtype,
            sampling=sampling,
            concurrent=32,
            world=World(rank=0, size=1),
        )
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()
