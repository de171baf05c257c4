"""One rank of test_sharded.py: every case on its rows of the head, and on its tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import (
    CASES,
    LEARNED,
    SPLITS,
    STATISTICS,
    coupled,
    own_arguments,
    part_of_sequence,
    problem,
    shard,
)
from safetensors.torch import save_file

from hsd_kernels import fused_hsd_loss, fused_token_loss, vocab_statistics

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
group = dist.group.WORLD


def gradients(call: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a call returns, and the gradients of its loss; the same bits when it is repeated."""
    found = []
    for _ in range(2):
        leaves = {name: given[name].detach().requires_grad_() for name in LEARNED}
        out = call(**{**given, **leaves}, process_group=group)
        loss = out["loss"] if isinstance(out, dict) else out.loss
        loss.backward()
        saved = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
        found.append((out, saved | {"loss": loss.detach()}))
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    return found[0]


for split, sizes in SPLITS[size].items():
    for case in CASES:
        given = shard(problem(case), sizes, rank)
        out, saved = gradients(fused_hsd_loss, given)
        for name in ("kl", "ref_kl", "logprob", "entropy", "lse", "top1_agree", "gradient_mass"):
            value = getattr(out.stats, name)
            if value is not None:
                saved[f"stats.{name}"] = value
        save_file(saved, folder / f"{split}-{case}-{rank}.safetensors")
    given = shard(problem("forward_kl"), sizes, rank)
    _, saved = gradients(fused_token_loss, own_arguments(given))
    save_file(saved, folder / f"{split}-own-{rank}.safetensors")
    values, saved = gradients(lambda **given: coupled(given, vocab_statistics), given)
    saved |= {f"stats.{name}": values[name].detach() for name in STATISTICS}
    save_file(saved, folder / f"{split}-statistics-{rank}.safetensors")
for case in CASES:
    given = part_of_sequence(problem(case), size, rank)
    leaves = {name: given[name].detach().requires_grad_() for name in LEARNED}
    out = fused_hsd_loss(**{**given, **leaves})
    out.loss.backward()
    loss = out.loss.detach()
    for summed in (loss, leaves["weight"].grad, leaves["bias"].grad):
        dist.all_reduce(summed)
    saved = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    save_file({**saved, "loss": loss}, folder / f"tokens-{case}-{rank}.safetensors")
dist.destroy_process_group()
