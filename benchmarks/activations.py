"""Works A, C, D and E: hidden states of SmolLM2-135M on rollouts of its own.

    python -m benchmarks.activations [--tokens 8192] [--updates 2] [--seed 0]

The quickstart's model after its warm-up and some of its steps answers the quickstart's questions;
its teacher is the same model, which sees the answer and a peer; its reference is the model before
those steps. Kept in the cache with the configuration and the rollouts, made once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.work import cache
from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.questions import question_stream
from hsd.distributed.process import World
from hsd.policy.head import response_hidden
from hsd.policy.packing import TrainingRow
from hsd.recipe import load_recipe, to_dict
from hsd.rollout.groups import Group, choose_peers
from hsd.train import train_step
from hsd.trainer import Trainer, prepare

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
ROWS_AT_ONCE = 32


def path() -> Path:
    return cache() / "A.safetensors"


def collect(trainer: Trainer, tokens: int, step: int) -> list[TrainingRow]:
    """Rollouts that have a peer, with `tokens` response tokens at least, sampled from `step` on."""
    config, world = trainer.config, trainer.world
    stream = question_stream(trainer.task.train, config.seed + 1)
    rows: list[TrainingRow] = []
    while sum(len(row.response) for row in rows) < tokens:
        groups = trainer.sampler.sample(stream, step)
        peers = choose_peers(trainer.peers, groups, world)
        before = len(rows)
        for group, shown in zip(groups, peers, strict=True):
            texts = [[peer.text for peer in own.successes] for own in shown]
            rows += _rows(group, texts, trainer.contexts)
        if len(rows) == before:
            raise ValueError("rollouts: found no success among a step's, expected some")
        step += 1
    return rows


def _rows(group: Group, peers: list[list[str]], contexts: ContextBuilder) -> list[TrainingRow]:
    """The rollouts of a group that have a peer to show, each once."""
    prompt, rows = tuple(contexts.student(group.question)), {}
    for rollout, texts in zip(group.rollouts, peers, strict=True):
        context = contexts.teacher(group.question, peers=texts) if texts else None
        if context is not None and rollout.token_ids:
            rows[rollout.token_ids] = TrainingRow(
                student_prompt=prompt,
                teacher_prompt=tuple(context.token_ids),
                response=rollout.token_ids,
                weights=(1.0,) * len(rollout.token_ids),
                logprobs=rollout.logprobs,
            )
    return list(rows.values())


@torch.no_grad()
def states(trainer: Trainer, rows: list[TrainingRow]) -> dict[str, torch.Tensor]:
    """Hidden states (N, D) of student, teacher and reference, their heads, and targets (N,)."""
    policy = trainer.policy
    parts: dict[str, list[torch.Tensor]] = {"student": [], "teacher": [], "reference": []}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        responses = [row.response for row in batch]
        plain = [row.student_prompt for row in batch]
        hinted = [row.teacher_prompt for row in batch]
        for name, model, prompts in (
            ("student", policy.model, plain),
            ("teacher", policy.model, hinted),
            ("reference", policy.initial, plain),
        ):
            parts[name].append(
                response_hidden(model, prompts, responses, compute_dtype=policy.compute_dtype)
            )
    found = {name: torch.cat(own).contiguous() for name, own in parts.items()}
    found["head"] = policy.head.weight.detach().float().clone()
    found["reference_head"] = policy.initial_head.weight.detach().float().clone()
    found["targets"] = torch.tensor([token for row in rows for token in row.response])
    return found


def make(config: Config, *, tokens: int, updates: int, console: Console) -> Path:
    """Writes the file; see the module."""
    trainer = prepare(config, World(rank=0, size=1), console)
    try:
        stream = question_stream(trainer.task.train, config.seed)
        for step in range(updates):
            train_step(trainer, stream, step)
            console.print(f"step {step + 1} of {updates}")
        rows = collect(trainer, tokens, updates)
        tensors = states(trainer, rows)
    finally:
        trainer.verifiers.close()
    path().parent.mkdir(parents=True, exist_ok=True)
    fresh = path().with_suffix(".part")
    described = {"recipe": to_dict(config), "updates": updates, "tokens": len(tensors["targets"])}
    metadata = {
        "configuration": json.dumps(described),
        "rows": json.dumps([dataclasses.asdict(row) for row in rows]),
    }
    save_file(tensors, fresh, metadata=metadata)
    fresh.replace(path())
    trainer.policy.model.save_pretrained(model_path())
    trainer.tokenizer.save_pretrained(model_path())
    return path()


def model_path() -> Path:
    """The model that the states are of."""
    return cache() / "model"


def stored_rows() -> list[TrainingRow]:
    """The rollouts behind the states, in their order."""
    with safe_open(path(), framework="pt") as file:
        rows: list[dict[str, Any]] = json.loads(file.metadata()["rows"])
    for row in rows:
        for name in ("student_prompt", "teacher_prompt", "response", "weights", "logprobs"):
            row[name] = tuple(row[name])
    return [TrainingRow(**row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    console = Console(stderr=True)
    config = dataclasses.replace(load_recipe(RECIPE), seed=a.seed)
    print(make(config, tokens=a.tokens, updates=a.updates, console=console))


if __name__ == "__main__":
    main()
