"""One rank of test_ranks.py: for each case its share of the rows, gradients summed over ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hsd.config import ObjectiveConfig
from hsd.distributed.process import join_world, leave_world
from hsd.objective.step import accumulate_gradients
from hsd.policy.head import output_head
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy

folder = Path(sys.argv[1])
world = join_world()
model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
initial = AutoModelForCausalLM.from_pretrained(folder / "initial").eval().requires_grad_(False)
policy = Policy(
    model=model,
    head=output_head(model),
    teacher=model,
    teacher_head=output_head(model),
    initial=initial,
    initial_head=output_head(initial),
    compute_dtype=torch.float32,
)
for name, shares in json.loads((folder / "cases.json").read_text()).items():
    rows = [
        TrainingRow(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in shares[world.rank]
    ]
    model.zero_grad(set_to_none=True)
    accumulate_gradients(
        policy, rows, ObjectiveConfig(ref_coef=0.3), micro_batch_tokens=40, temperature=1.0
    )
    world.sum_gradients(model.parameters())
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    gathered = world.gather([f"{name}/{position}" for position in range(len(rows))])
    save_file({"gradient": gradients}, folder / f"{name}-{world.rank}.safetensors")
    (folder / f"{name}-{world.rank}.json").write_text(json.dumps(gathered))
leave_world()
