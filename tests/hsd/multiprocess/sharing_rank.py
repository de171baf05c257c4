"""Ranks of test_shared_engine.py: they share a server, and sample in turns with updates.

python sharing_rank.py FOLDER RANKS: writes what each rank got to FOLDER/RANKS-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx2
import torch
from forked import run_ranks
from transformers import AutoTokenizer

from hsd.distributed.config import ShardingConfig
from hsd.distributed.load import load_sharded
from hsd.distributed.process import World, join_world, leave_world, sharding_mesh
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Rollout, Sampling
from hsd.rollout.vllm_server import VllmServerEngine

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SAMPLING = Sampling(max_new_tokens=6)


def sample(engine: VllmServerEngine, world: World, prompts: list[list[int]]) -> list[Any]:
    """This rank's groups, by prompt."""
    own = world.share(list(enumerate(prompts)))
    groups: list[list[Rollout]] = engine.generate(
        [prompt for _, prompt in own],
        seeds=[100 * number for number, _ in own],
        group_size=2,
        sampling=SAMPLING,
    )
    return [
        [prompt, [[r.token_ids, r.logprobs, r.policy_version] for r in group]]
        for (_, prompt), group in zip(own, groups, strict=True)
    ]


def main(folder: Path) -> int:
    world = join_world()
    model = load_sharded(
        folder / "model",
        ShardingConfig(mode="full"),
        sharding_mesh(),
        compute_dtype=torch.float32,
    )
    engine = VllmServerEngine(
        EngineConfig(
            kind="vllm",
            shared=True,
            sleep=True,
            tensor_parallel=world.size,
            environment={"PYTHONPATH": str(folder), "FAKE_VLLM_CALLS": str(folder / "calls")},
            sync_directory=folder / f"sync-{world.size}",
            start_timeout=120.0,
        ),
        model,
        AutoTokenizer.from_pretrained(folder / "model"),
        compute_dtype=torch.float32,
        sampling=SAMPLING,
        concurrent=8,
        world=world,
    )
    found: dict[str, Any] = {"servers": len(engine.replicas)}

    def behave(**behaviour: Any) -> None:
        for replica in engine.replicas:
            httpx2.post(f"{replica.client.url}/behave", json=behaviour, trust_env=False)

    def update(version: int) -> None:
        engine.sleep()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01
        engine.update_weights(model, version=version)

    found["first"] = sample(engine, world, PROMPTS)
    update(1)
    found["second"] = sample(engine, world, PROMPTS)
    found["one prompt"] = sample(engine, world, PROMPTS[:1])
    behave(at="/inference/v1/generate", die=True)
    found["lost"] = sample(engine, world, PROMPTS)
    found["retries"] = engine.health()["engine_retries"]
    update(2)
    found["after"] = sample(engine, world, PROMPTS)
    behave(at="/inference/v1/generate", status=400)
    try:
        sample(engine, world, PROMPTS[:1])
    except EngineError as error:
        found["error"] = str(error)
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(found))
    engine.close()
    leave_world()
    return 0


if __name__ == "__main__":
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    run_ranks(count, lambda: main(path)) if count > 1 else sys.exit(main(path))
