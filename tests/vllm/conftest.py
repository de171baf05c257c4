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

from hsd.policy.load import load_policy
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import Sampling
from hsd.rollout.vllm_server import VllmServerEngine

MODEL = "smollm2-135m-instruct"
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
ARGUMENTS = ("--max-model-len", "1024", "--enforce-eager")


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """Python of the environment with vLLM; `make test-vllm` names it."""
    path = os.environ.get("HSD_VLLM_PYTHON")
    if not path or not Path(path).exists():
        pytest.fail(f"HSD_VLLM_PYTHON: found {path!r}, expected a Python with vLLM; make test-vllm")
    return Path(path)


@pytest.fixture
def policy() -> Policy:
    return Policy(*load_policy(MODEL))


@pytest.fixture
def start_engine(vllm_python: Path, policy: Policy) -> Iterator[Callable[..., VllmServerEngine]]:
    """Starts servers of the policy; they end with the test."""
    started = []

    def start(sampling: Sampling, *, dtype: torch.dtype, **options: Any) -> VllmServerEngine:
        config = EngineConfig(
            kind="vllm",
            python=vllm_python,
            arguments=ARGUMENTS,
            environment=ENVIRONMENT,
            **options,
        )
        engine = VllmServerEngine(
            config,
            policy.model,
            policy.tokenizer,
            compute_dtype=dtype,
            sampling=sampling,
            concurrent=32,
        )
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()
