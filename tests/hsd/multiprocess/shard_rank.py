"""One rank of test_sharding.py: trains sharded, case by case, on its share of the questions."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from sharded_steps import run_steps
from sharding_cases import ALL, Case, rows_of_steps
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hsd.distributed.load import load_sharded
from hsd.distributed.process import World, join_world, leave_world, sharding_mesh
from hsd.policy.teachers import make_policy


def train(folder: Path, name: str, case: Case, world: World) -> None:
    dtype = getattr(torch, case.compute_dtype)
    load = partial(
        load_sharded, folder / case.model, case.sharding, sharding_mesh(), compute_dtype=dtype
    )
    model = load()
    for module in model.modules():
        if isinstance(module, FSDPModule) and case.divide_factor != 1.0:
            module.set_gradient_divide_factor(case.divide_factor)
    policy = make_policy(
        model,
        case.objective,
        compute_dtype=dtype,
        copy_of=lambda _, moves: load(frozen=True, dtype=torch.float32 if moves else dtype),
    )
    found: dict[str, Tensor] = {}

    def keep(step: int, kind: str, values: Tensor) -> None:
        found[f"{kind}/{step}"] = values.float().contiguous()

    run_steps(case, policy, rows_of_steps(), world, keep)
    tied = policy.head.weight is model.get_input_embeddings().weight
    found["tied"] = torch.tensor(tied)
    save_file(found, folder / f"{name}-{world.rank}.safetensors")


folder = Path(sys.argv[1])
world = join_world()
for name, case in ALL[world.size].items():
    train(folder, name, case, world)
leave_world()
