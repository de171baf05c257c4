"""One rank of test_resume_ranks.py: steps of a sharded model, saved by some ranks, read by others.

Arguments: folder, "write" or "read".
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from hsd.data.peers import PeerConfig, PeerPolicy
from hsd.distributed.checkpoint import Checkpoints, whole_checkpoints
from hsd.distributed.process import join_world, leave_world
from hsd.resume import Position, own_state, restore, shared_state, tensors_of
from hsd.trainer import Trainer

folder, mode = Path(sys.argv[1]), sys.argv[2]
world = join_world()


def sharded() -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def steps(count: int) -> None:
    """The same rows on every rank: their mean gradient does not depend on the number of ranks."""
    for step in range(count):
        rows = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


model, initial = sharded(), sharded()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
trainer = cast(
    "Trainer",
    SimpleNamespace(
        world=world,
        policy=SimpleNamespace(model=model, initial=initial, teacher=model),
        optimizer=optimizer,
        peers=PeerPolicy(PeerConfig(), seed=0),
        engine=SimpleNamespace(update_weights=lambda *_, **__: None),
    ),
)
if mode == "write":
    steps(2)
    checkpoints = Checkpoints(folder / "saved", world, keep=1)
    state = shared_state(trainer, Position(step=2))
    checkpoints.save(2, tensors_of(trainer), shared=state, own=own_state())
    steps(1)  # while it is written
    checkpoints.close()
else:
    restore(trainer, whole_checkpoints(folder / "saved")[-1][1])
    steps(1)
whole = get_model_state_dict(
    model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
)
if world.is_main:
    save_file({k: v.contiguous() for k, v in whole.items()}, folder / f"{mode}.safetensors")
leave_world(world)
