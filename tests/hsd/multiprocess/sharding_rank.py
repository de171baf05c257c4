"""One rank of test_sharding.py: trains sharded, case by case, on its share of the questions."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from sharded_steps import flat, run_steps
from sharding_cases import ALL, OFFLOADS, Case, rows_of_steps
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from hsd.distributed.config import ShardingConfig
from hsd.distributed.fsdp import local_part
from hsd.distributed.load import load_sharded
from hsd.distributed.process import World, join_world, leave_world, sharding_mesh
from hsd.policy.attention import with_packing
from hsd.policy.optimizer import adamw
from hsd.trainer import sharded_policy


def train(folder: Path, name: str, case: Case, world: World) -> None:
    dtype = getattr(torch, case.compute_dtype)
    load = partial(
        load_sharded, folder / case.model, case.sharding, sharding_mesh(), compute_dtype=dtype
    )
    policy = sharded_policy(case.config, load, dtype)
    for module in policy.model.modules():
        if isinstance(module, FSDPModule) and case.divide_factor != 1.0:
            module.set_gradient_divide_factor(case.divide_factor)
    policy = with_packing(policy, "packed" if case.packed else "padded")
    found: dict[str, Tensor] = {}

    def keep(step: int, kind: str, values: Tensor) -> None:
        found[f"{kind}/{step}"] = values.float().contiguous()

    run_steps(case, policy, rows_of_steps(), world, keep)
    embedding: Any = policy.model.get_input_embeddings()
    tied = policy.head.weight is embedding.weight
    found["tied"] = torch.tensor(tied)
    save_file(found, folder / f"{name}-{world.rank}.safetensors")


def resume(folder: Path, name: str, offload: Literal["none", "optimizer", "all"]) -> None:
    """A step after a state of model and optimiser was saved, and again from what was saved."""
    sharding = ShardingConfig(mode="full", offload=offload)
    generator = torch.Generator().manual_seed(0)

    def fresh() -> tuple[PreTrainedModel, torch.optim.Optimizer]:
        model = load_sharded(
            folder / "llama-tied", sharding, sharding_mesh(), compute_dtype=torch.float32
        )
        return model, adamw(model.parameters(), 1e-2, on_host=offload == "optimizer")

    def step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
        generator.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            local_part(parameter.grad).normal_(generator=generator)
        optimizer.step()
        return flat(model)

    model, optimizer = fresh()
    step(model, optimizer, 1)
    weights, states = get_state_dict(model, optimizer)
    path = folder / f"{name}-saved"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
    expected = step(model, optimizer, 2)
    model, optimizer = fresh()
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    found = {"expected": expected, "resumed": step(model, optimizer, 2)}
    save_file(found, folder / f"{name}-{dist.get_rank()}.safetensors")


folder = Path(sys.argv[1])
world = join_world()
for name, case in ALL[world.size].items():
    train(folder, name, case, world)
if world.size == 2:
    for offload in OFFLOADS:
        resume(folder, f"resumed-{offload}", offload)
leave_world()
