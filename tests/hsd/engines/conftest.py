"""Stand-ins for vLLM servers, in threads and as processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from fake_vllm import Server
from vllm_cases import SAMPLING, Start

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import Sampling
from hsd.rollout.vllm_server import VllmServerEngine

FAKE = Path(fake_vllm.__file__)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server().start() as running:
        yield running
        running.shutdown()


@pytest.fixture
def start(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Iterator[Start]:
    """An engine; without urls its servers are processes, in an environment with a false vllm."""
    module = tmp_path / "vllm" / "entrypoints" / "cli"
    module.mkdir(parents=True)
    (module / "main.py").write_text(FAKE.read_text(encoding="utf-8"), encoding="utf-8")
    engines = []

    def make(*, sampling: Sampling = SAMPLING, **options: Any) -> VllmServerEngine:
        if "urls" not in options:
            options.setdefault("environment", {"PYTHONPATH": str(tmp_path)})
        options = {"start_timeout": 60.0, "sync_directory": tmp_path / "sync", **options}
        engine = VllmServerEngine(
            EngineConfig(kind="vllm", **options),
            make_model(),
            tokenizer,
            compute_dtype=torch.float32,
            sampling=sampling,
            concurrent=8,
            world=World(rank=0, size=1),
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
    assert not list((tmp_path / "sync").glob("*"))
