"""Steps of a sharded model, saved by two ranks and continued by three; the argument is a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from forked import run_ranks
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from hsd.config import Config
from hsd.data.peers import PeerConfig, PeerPolicy
from hsd.distributed.checkpoint import Checkpoints, whole_checkpoints
from hsd.distributed.process import World, join_world
from hsd.run.resume import Position, own_state, restore, shared_state, tensors_of
from hsd.trainer import Trainer

folder = Path(sys.argv[1])


def sharded() -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_trainer(world: World) -> Trainer:
    model, initial = sharded(), sharded()
    parts = {
        "world": world,
        "config": Config(),
        "policy": SimpleNamespace(model=model, initial=initial, teacher=model),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "peers": PeerPolicy(PeerConfig(), seed=0),
        "engine": SimpleNamespace(update_weights=lambda *_, **__: None),
    }
    return cast("Trainer", SimpleNamespace(**parts))


def step(trainer: Trainer, number: int) -> None:
    """The same rows on every rank: their mean gradient does not depend on the number of ranks."""
    rows = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(number))
    model: Any = trainer.policy.model
    model(input_ids=rows, labels=rows).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def save_whole(trainer: Trainer, name: str) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(trainer.policy.model, options=options)
    if trainer.world.is_main:
        save_file({k: v.contiguous() for k, v in whole.items()}, folder / f"{name}.safetensors")


def write() -> int:
    trainer = sharded_trainer(join_world())
    checkpoints = Checkpoints(folder / "saved", trainer.world, keep=1)
    step(trainer, 0)
    step(trainer, 1)
    state = shared_state(trainer, Position(step=2))
    moving, still = tensors_of(trainer)
    checkpoints.save(2, moving, still=still, shared=state, own=own_state())
    step(trainer, 2)  # while it is written
    checkpoints.close()
    save_whole(trainer, "write")
    return 0


def read() -> int:
    trainer = sharded_trainer(join_world())
    restore(trainer, whole_checkpoints(folder / "saved")[-1][1])
    step(trainer, 2)
    save_whole(trainer, "read")
    return 0


run_ranks(2, write)
run_ranks(3, read)
