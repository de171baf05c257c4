"""Training, step by step; the parts of the objective are chosen by the configuration.

    questions -> rollouts -> rewards -> group filter -> peers -> contexts, advantages, weights ->
    hidden states -> fused loss -> optimiser -> teachers -> weights back to the engine

`hsd train RECIPE` and `torchrun --nproc-per-node N -m hsd.train RECIPE` run it; hsd/run/loop.py
repeats the step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

from hsd.credit.during import watch_credit
from hsd.data.peers import Peers
from hsd.data.questions import Question
from hsd.distributed.fsdp import is_sharded
from hsd.distributed.process import World
from hsd.objective.batch import JudgedRollout, judge
from hsd.objective.measures import step_metrics
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy.optimizer import clipped_step, learning_rate
from hsd.policy.teachers import after_update
from hsd.rollout.groups import Group, choose_peers, step_totals
from hsd.trainer import Trainer

Judged: TypeAlias = tuple[Group, list[JudgedRollout]]


class NotFinite(FloatingPointError):
    """A loss or a gradient is not finite, and its update may not be skipped.

    Attributes:
        judged: the groups of the step, of all ranks.
        first: no update of the step was made: the run is where it was before the step.
    """

    def __init__(self, message: str, judged: list[Judged], *, first: bool) -> None:
        super().__init__(message)
        self.judged = judged
        self.first = first


def update(
    trainer: Trainer, judged: Sequence[Judged], step: int
) -> tuple[torch.Tensor, float, float]:
    """One optimiser update; what `accumulate_gradients` returns, and the gradient's norm.

    Without a row with weight on any rank there is none: momentum alone would move the weights.

    Raises:
        FloatingPointError: loss or gradient is not finite, on every rank; the weights are as they
            were.
    """
    config, model = trainer.config, trainer.policy.model
    rows = [outcome.row for _, outcomes in judged for outcome in outcomes if outcome.row]
    weighted = torch.tensor(sum(any(row.weights) for row in rows))
    if not trainer.world.sum_(weighted):
        return torch.zeros(len(SUMS), dtype=torch.float64), 0.0, 0.0
    sums, largest_gap = accumulate_gradients(
        trainer.policy,
        rows,
        config.objective,
        micro_batch_tokens=config.micro_batch_tokens,
        temperature=config.rollout.temperature,
        step=step,
    )
    bad = trainer.world.sum_((~sums[SUMS.index("loss")].isfinite()).long())
    if bad:
        raise FloatingPointError("loss: found one that is not finite, expected a finite one")
    if not is_sharded(model):  # the backward of a sharded one has summed them
        trainer.world.sum_gradients(model.parameters())
    norm = clipped_step(
        trainer.optimizer,
        model.parameters(),
        learning_rate=learning_rate(config.optimizer, step=step, steps=config.steps),
        max_grad_norm=config.optimizer.max_grad_norm,
    )
    return sums, largest_gap, norm


def train_step(
    trainer: Trainer, stream: Iterator[Question], step: int, *, may_skip: bool = False
) -> tuple[dict[str, float], list[Judged]]:
    """One step on questions from the stream.

    Args:
        may_skip: an update whose loss or gradient is not finite is left out.

    Returns:
        metrics and judged groups, of all ranks; groups that the filter took out come last and have
        no judgement.

    Raises:
        NotFinite: where `may_skip` does not hold.
    """
    config, world = trainer.config, trainer.world
    started = time.perf_counter()
    groups = trainer.sampler.sample(stream, step)
    trainer.engine.sleep()
    kept = [group for group in groups if group.place >= 0]
    sampled = time.perf_counter()

    peers = choose_peers(trainer.peers, kept, world)
    watch_credit(trainer, kept, peers, step)
    watched = time.perf_counter()
    judged: list[Judged] = []
    sums, largest_gap, norm = torch.zeros(len(SUMS), dtype=torch.float64), 0.0, 0.0
    updates, skipped = config.optimizer.updates_per_step, 0
    for part in range(updates):
        chosen = [pair for pair in zip(kept, peers, strict=True) if pair[0].place % updates == part]
        outcomes = _judged(trainer, chosen)
        judged += outcomes
        try:
            part_sums, gap, part_norm = update(trainer, outcomes, step)
            sums, largest_gap, norm = sums + part_sums, max(largest_gap, gap), max(norm, part_norm)
        except FloatingPointError as error:
            trainer.optimizer.zero_grad(set_to_none=True)
            skipped += 1
            if not may_skip:
                found = _gathered(world, judged, groups)
                raise NotFinite(str(error), found, first=part == 0) from error
        after_update(trainer.policy, config.objective, updates=step * updates + part + 1)
    trainer.engine.update_weights(trainer.policy.model, version=step + 1)
    ended = time.perf_counter()

    metrics = step_metrics(world, config, groups, judged, sums, largest_gap, step=step)
    metrics |= {
        "grad_norm": norm,
        "skipped_updates": float(skipped),
        "learning_rate": learning_rate(config.optimizer, step=step, steps=config.steps),
        "rollout_seconds": sampled - started,
        "update_seconds": ended - watched,
        "tokens_per_second": metrics["generated_tokens"] / (ended - watched + sampled - started),
        **trainer.engine.health(),
    }
    everything = _gathered(world, judged, groups)
    trainer.peers.remember(
        attempt for group, outcomes in everything if outcomes for attempt in group.attempts
    )
    return metrics, everything


def _judged(trainer: Trainer, groups: Sequence[tuple[Group, Sequence[Peers]]]) -> list[Judged]:
    """The groups of one update with the peers of their rollouts; weighted for the whole of it."""
    config = trainer.config
    totals = step_totals([group for group, _ in groups], config, trainer.world)
    return [(group, judge(group, own, trainer.contexts, config, totals)) for group, own in groups]


def _gathered(world: World, judged: list[Judged], groups: Sequence[Group]) -> list[Judged]:
    """The groups of all ranks in an order that does not depend on their number."""
    kept = sorted(world.gather(judged), key=lambda pair: pair[0].place)
    others = world.gather([group for group in groups if group.place < 0])
    return kept + [(group, []) for group in sorted(others, key=lambda each: each.question.id)]


def main(argv: list[str]) -> int:
    """`hsd train RECIPE ...`; returns the exit code."""
    from hsd.run.loop import run  # it repeats the step that this module holds

    return run(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
