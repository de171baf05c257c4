"""One optimiser update of the trainer against one of TRL's experimental SDPO trainer.

    python -m benchmarks.update --out FILE [--tokens 2048] [--response 256] [--rounds 5]
    python -m benchmarks.update --memory --out FILE [--tokens 4096] [--response 256]

The second form measures the peak of memory alone, each side in a process of its own.

Compared: the same model, rollouts, teacher prompts and micro-batch (all rows in one), fp32, the
loss KL(teacher, student) of a live teacher, mean over a rollout's tokens, then over rollouts; both
forwards, loss, backward, clipping to the same norm, the same AdamW. TRL's part is its own
`compute_loss` (distillation_mode="full_logits", distillation_alpha=0) on the batch it would have
built: prompts padded on the left, responses on the right. Its generation is left out, as is ours.
Rollouts are all distinct, so that merging equal ones, a gain of ours, plays no part. The model's
own are a dozen tokens long: `--response` joins consecutive ones to responses of that many.

The trainer's measurement of the KL to the reference, a forward pass that TRL does not run, is off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import activations, machine, memory, timing
from benchmarks.case import write
from benchmarks.methods import FLOOR, METHODS, execute
from benchmarks.update_rows import joined, padded_tokens, trl_batch, weighted
from benchmarks.work import Work
from hsd.objective import step as objective_step
from hsd.objective.config import ObjectiveConfig
from hsd.objective.step import accumulate_gradients
from hsd.policy.head import output_head, response_hidden
from hsd.policy.load import load_policy
from hsd.policy.optimizer import adamw, clipped_step
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy, make_policy

RATE, MAX_NORM = 1e-6, 1.0
HEAD_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model and how its gradient is formed."""

    model: Any
    optimizer: torch.optim.Optimizer
    gradients: Callable[[], None]  # adds to the parameters' .grad

    def update(self) -> None:
        self.gradients()
        clipped_step(
            self.optimizer, self.model.parameters(), learning_rate=RATE, max_grad_norm=MAX_NORM
        )

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def ours(model: Any, rows: Sequence[TrainingRow]) -> tuple[Side, Policy]:
    objective = ObjectiveConfig(teacher="live", ref_coef=0.0, measure_reference=False)
    policy = make_policy(model, objective, compute_dtype=torch.float32)
    budget = len(rows) * max(row.length for row in rows)

    def gradients() -> None:
        accumulate_gradients(policy, rows, objective, micro_batch_tokens=budget, temperature=1.0)

    side = Side(model=model, optimizer=adamw(model.parameters(), RATE), gradients=gradients)
    return side, policy


def trl(model: Any, tokenizer: Any, rows: Sequence[TrainingRow], folder: str) -> Side:
    """TRL's trainer around the model, given the batch directly."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    trainer = SDPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=SDPOConfig(
            output_dir=folder,
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            distillation_is_clip=None,
            teacher_model_kind="live",
            temperature=1.0,
            per_device_train_batch_size=8,
            num_generations=8,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["-"] * 8}),
        processing_class=tokenizer,
    )
    model.eval()  # as ours; this model has no dropout, and TRL then divides by no accumulation
    inputs = trl_batch(rows)

    def gradients() -> None:
        trainer.compute_loss(model, inputs).backward()

    return Side(model=model, optimizer=adamw(model.parameters(), RATE), gradients=gradients)


def gradient_difference(first: Side, second: Side) -> float:
    """|g1 - g2| / |g2| over all parameters; leaves none behind."""
    for side in (first, second):
        side.gradients()
    error = size = 0.0
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        error += float((a.grad.double() - b.grad.double()).square().sum())
        size += float(b.grad.double().square().sum())
    for side in (first, second):
        side.clear()
    return float((error / size) ** 0.5)


def head_work(policy: Policy, rows: Sequence[TrainingRow]) -> Work:
    """The head's part of the update as a work of its own."""
    responses = [row.response for row in rows]
    with torch.no_grad():
        student, teacher = (
            response_hidden(policy.model, prompts, responses, compute_dtype=torch.float32)
            for prompts in (
                [row.student_prompt for row in rows],
                [row.teacher_prompt for row in rows],
            )
        )
    return Work(
        loss="forward_kl",
        student=student,
        teacher=teacher,
        head=output_head(policy.model).weight.detach(),
        targets=torch.tensor([token for row in rows for token in row.response]),
    )


class _Watched:
    """Adds up the seconds inside the trainer's fused loss."""

    def __enter__(self) -> _Watched:
        self.seconds, self._loss = 0.0, objective_step.fused_hsd_loss

        def watched(*arguments: Any, **options: Any) -> Any:
            found: list[Any] = []
            self.seconds += timing.seconds(lambda: found.append(self._loss(*arguments, **options)))
            return found[0]

        objective_step.fused_hsd_loss = watched
        return self

    def __exit__(self, *_: object) -> None:
        objective_step.fused_hsd_loss = self._loss


def compare(rows: Sequence[TrainingRow], name: str, rounds: int) -> dict[str, Any]:
    """The record of both sides."""
    model, tokenizer = load_policy(name)
    other, _ = load_policy(name)
    side, policy = ours(model, rows)
    with tempfile.TemporaryDirectory() as folder:
        theirs = trl(other, tokenizer, rows, folder)
        difference = gradient_difference(side, theirs)
        for each in (side, theirs):
            each.update()  # the optimiser's state is there from now on
        work = head_work(policy, rows)
        plain = next(m for m in METHODS if m.name == "torch")
        seconds = timing.alternated(
            {
                "ours": side.update,
                "trl": theirs.update,
                "plain_head": lambda: execute(plain, work, 0),
                "floor_head": lambda: execute(FLOOR, work, min(HEAD_CHUNK, work.shape[0])),
            },
            rounds=rounds,
        )
        with _Watched() as watched:
            side.update()
    return {
        "kind": "update",
        "padded_tokens": padded_tokens(rows),
        "gradient_difference": difference,
        "seconds": seconds,
        "head_seconds": watched.seconds,
    }


def extra_bytes(label: str, rows: Sequence[TrainingRow], name: str) -> int:
    """Peak of an update of "ours" or "trl" above parameters, gradients and optimiser state."""
    model, tokenizer = load_policy(name)
    with tempfile.TemporaryDirectory() as folder:
        side = ours(model, rows)[0] if label == "ours" else trl(model, tokenizer, rows, folder)
        side.update()  # the optimiser's state is there from now on
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        return memory.allocated(side.update) - gradients


def _isolated(label: str, arguments: Sequence[str]) -> int:
    """`extra_bytes` in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.update", "--side", label]
    ran = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, help="response tokens")
    parser.add_argument("--response", type=int, default=256, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(activations.model_path()))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--memory", action="store_true", help="the peaks and nothing else")
    kind.add_argument("--side", choices=("ours", "trl"), help="print one side's peak")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.side is None and a.out is None:
        parser.error("--out: found none, expected a file")
    tokens = a.tokens or (4096 if a.memory else 2048)
    before = machine.described()
    rows = weighted(joined(activations.stored_rows(), a.response), tokens)
    if a.side is not None:
        print(json.dumps(extra_bytes(a.side, rows, a.model)))
        return
    counted = {
        "rollouts": len(rows),
        "response_tokens": sum(len(row.response) for row in rows),
        "machine": before,
    }
    if a.memory:
        given = ["--tokens", str(tokens), "--response", str(a.response), "--model", a.model]
        peaks = {label: _isolated(label, given) for label in ("ours", "trl")}
        write(a.out, {"kind": "update_memory", "extra_bytes": peaks, **counted})
        return
    write(a.out, {**compare(rows, a.model, a.rounds), **counted})


if __name__ == "__main__":
    main()
