"""What the tests of the engine of vLLM servers sample, and what has to come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from fake_vllm import fingerprint

from hsd.rollout.protocol import Rollout, Sampling
from hsd.rollout.vllm_server import VllmServerEngine

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
SAMPLING = Sampling(max_new_tokens=6)

Start = Callable[..., VllmServerEngine]


def sample(engine: VllmServerEngine, group_size: int = 3) -> list[list[Rollout]]:
    return engine.generate(
        PROMPTS, seeds=[100 * n for n in range(4)], group_size=group_size, sampling=SAMPLING
    )


def behave(engine: VllmServerEngine, **behaviour: Any) -> None:
    for replica in engine.replicas:
        httpx2.post(f"{replica.client.url}/behave", json=behaviour)


def require_current(groups: list[list[Rollout]], tmp_path: Path, version: int) -> None:
    """Whole, in order, of the weights in the newest files, and of their version."""
    (newest,) = (tmp_path / "sync").glob("*/version-*")
    assert newest.name == f"version-{version}"
    assert [len(group) for group in groups] == [3] * 4
    for rollout in (rollout for group in groups for rollout in group):
        assert rollout.policy_version == version
        assert set(rollout.logprobs) == {-1 - fingerprint(newest)}
