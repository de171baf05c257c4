"""One rank of test_sharded.py: every case on its rows of the head, and on its tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from cases import CASES, LEARNED, SPLITS, part_of_sequence, problem, shard
from safetensors.torch import save_file

from hsd_kernels import fused_hsd_loss, vocab_statistics

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
group = dist.group.WORLD
for split, sizes in SPLITS[size].items():
    for case in CASES:
        given = shard(problem(case), sizes, rank)
        leaves = {name: given[name].detach().requires_grad_() for name in LEARNED}
        out = fused_hsd_loss(**{**given, **leaves}, process_group=group)
        out.loss.backward()
        saved = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
        for name in ("kl", "ref_kl", "logprob", "entropy", "lse", "top1_agree", "gradient_mass"):
            value = getattr(out.stats, name)
            if value is not None:
                saved[f"stats.{name}"] = value
        save_file(
            {**saved, "loss": out.loss.detach()}, folder / f"{split}-{case}-{rank}.safetensors"
        )
    given = shard(problem("forward_kl"), sizes, rank)
    student = given["student_hidden"].requires_grad_()
    names = ("teacher_hidden", "weight", "bias", "targets", "vocab_size")
    found = vocab_statistics(
        student, **{n: given[n] for n in names if n in given}, process_group=group
    )
    (found.forward_kl.sum() * found.entropy.sum()).backward()
    save_file(
        {"grad.student_hidden": student.grad}, folder / f"{split}-statistics-{rank}.safetensors"
    )
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
