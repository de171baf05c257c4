"""Training, step by step; the parts of the objective are chosen by the configuration.

    questions -> rollouts -> rewards -> group filter -> peers -> contexts, advantages, weights ->
    hidden states -> fused loss -> optimiser -> teachers -> weights back to the engine

`hsd train RECIPE` and `torchrun --nproc-per-node N -m hsd.train RECIPE` run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from hsd.config import Config
from hsd.data.questions import Question, question_stream
from hsd.data.verify import Outcome
from hsd.distributed.fsdp import is_sharded, whole_weights
from hsd.distributed.process import World, join_world, leave_world
from hsd.evaluate import accuracy_table, evaluate
from hsd.logs.completions import completion_rows, completions_table
from hsd.metrics import StepProgress, sample_table
from hsd.objective.batch import JudgedRollout, judge
from hsd.objective.measures import step_metrics
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy.optimizer import clipped_step, learning_rate
from hsd.policy.teachers import after_update
from hsd.recipe import fail, parse_arguments, to_dict
from hsd.rollout.groups import Group, GroupSampler, choose_peers, step_totals
from hsd.rollout.protocol import EngineError
from hsd.run import RunFolder
from hsd.scores import Evaluation, gain
from hsd.trainer import Trainer, prepare

Judged: TypeAlias = tuple[Group, list[JudgedRollout]]


def update(
    trainer: Trainer, judged: Sequence[Judged], step: int
) -> tuple[torch.Tensor, float, float]:
    """One optimiser update; what `accumulate_gradients` returns, and the gradient's norm.

    Without a row with weight on any rank there is none: momentum alone would move the weights.
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
    trainer: Trainer, stream: Iterator[Question], step: int
) -> tuple[dict[str, float], list[Judged]]:
    """One step on questions from the stream.

    Returns:
        metrics and judged groups, of all ranks.
    """
    config, world = trainer.config, trainer.world
    started = time.perf_counter()
    sampler = GroupSampler(
        config=config,
        engine=trainer.engine,
        tokenizer=trainer.tokenizer,
        contexts=trainer.contexts,
        judge=trainer.verifiers.judge,
        sampling=trainer.sampling,
        world=world,
    )
    groups = sampler.sample(stream, step)
    trainer.engine.sleep()
    kept = [group for group in groups if group.place >= 0]
    sampled = time.perf_counter()

    peers = choose_peers(trainer.peers, kept, world)
    judged: list[Judged] = []
    sums, largest_gap, norm = torch.zeros(len(SUMS), dtype=torch.float64), 0.0, 0.0
    updates = config.optimizer.updates_per_step
    for part in range(updates):
        chosen = [pair for pair in zip(kept, peers, strict=True) if pair[0].place % updates == part]
        totals = step_totals([group for group, _ in chosen], config, world)
        outcomes = [
            (group, judge(group, shown, trainer.contexts, config, totals))
            for group, shown in chosen
        ]
        judged += outcomes
        part_sums, gap, part_norm = update(trainer, outcomes, step)
        after_update(trainer.policy, config.objective, updates=step * updates + part + 1)
        sums, largest_gap, norm = sums + part_sums, max(largest_gap, gap), max(norm, part_norm)
    trainer.engine.update_weights(trainer.policy.model, version=step + 1)
    ended = time.perf_counter()

    metrics = step_metrics(world, config, groups, judged, sums, largest_gap, step=step)
    found = [outcome for group in groups for outcome in group.outcomes]
    counts = world.sum_(torch.tensor([found.count(outcome) for outcome in Outcome])).tolist()
    metrics |= {
        f"verifier_{outcome.value}": float(count)
        for outcome, count in zip(Outcome, counts, strict=True)
    }
    metrics |= {
        "grad_norm": norm,
        "learning_rate": learning_rate(config.optimizer, step=step, steps=config.steps),
        "rollout_seconds": sampled - started,
        "update_seconds": ended - sampled,
        "tokens_per_second": metrics["generated_tokens"] / (ended - started),
        **trainer.engine.health(),
    }
    judged = sorted(world.gather(judged), key=lambda pair: pair[0].place)
    trainer.peers.remember(attempt for group, _ in judged for attempt in group.attempts)
    return metrics, judged


def _measure(trainer: Trainer, step: int, run: RunFolder | None) -> Evaluation:
    """Accuracy on the evaluation split, recorded."""
    config = trainer.config
    started = time.perf_counter()
    result = evaluate(
        trainer.engine,
        trainer.tokenizer,
        trainer.contexts,
        getattr(trainer.task, config.evaluation.split),
        trainer.verifiers.judge,
        sampling=trainer.sampling,
        samples=config.evaluation.samples,
        seed=config.seed,
        world=trainer.world,
        shown=config.show_samples,
    )
    if run:
        run.metrics(
            "evaluation",
            step,
            {
                "split": config.evaluation.split,
                **result.record(),
                "seconds": time.perf_counter() - started,
            },
        )
    return result


class UnusableInput(ValueError):
    """Task, model or run folder cannot be used; the message says why, and nothing was left."""


def train(config: Config, world: World, console: Console) -> None:
    """A whole run: evaluation, steps, evaluation; what it leaves is in its folder.

    Raises:
        UnusableInput: before the first evaluation.
        FloatingPointError: a gradient is not finite; the checkpoint has the last good weights.
    """
    path = config.run_dir or Path("runs") / "run"
    if config.rollout.top_p < 1:
        console.print("[yellow]rollout.top_p < 1: peers are no exact samples of the policy")
    run = None
    try:
        run = RunFolder(path, config) if world.is_main else None
        trainer = prepare(config, world, console)
    except BaseException as error:
        if run:
            run.discard()
        if isinstance(error, ValueError | OSError):
            raise UnusableInput(str(error)) from error
        raise
    try:
        _steps(trainer, run, console)
    finally:
        trainer.engine.close()
        trainer.verifiers.close()
        if trainer.verifiers.last_error:
            console.print(f"a verifier failed: {trainer.verifiers.last_error}", markup=False)
        if run:
            run.close()
            console.print(f"run folder: {path}")


def _steps(trainer: Trainer, run: RunFolder | None, console: Console) -> None:
    config = trainer.config
    stream = question_stream(trainer.task.train, config.seed)
    done = 0
    try:
        console.print("evaluating before training ...")
        evaluations = [("before", _measure(trainer, 0, run))]
        console.print(sample_table(evaluations[0][1].samples, title="samples before training"))
        with StepProgress(console, steps=config.steps, label="training") as progress:
            for step in range(config.steps):
                metrics, judged = train_step(trainer, stream, step)
                done = step + 1
                progress.advance(metrics, step=done)
                if run:
                    run.metrics("step", done, metrics)
                    for group, outcomes in judged:
                        run.rollouts(done, group, outcomes)
                shown = config.logging.completions_every
                if shown and done % shown == 0:
                    rows = completion_rows(judged, config.show_samples)
                    console.print(completions_table(rows, title=f"rollouts of step {done}"))
                    if run:
                        run.completions(done, rows)
                every, last = config.evaluation.every, done == config.steps
                if every and done % every == 0 and not last:
                    evaluations.append((f"step {done}", _measure(trainer, done, run)))
                if config.checkpoint_every and done % config.checkpoint_every == 0:
                    _checkpoint(trainer, run)
    finally:
        # An interrupt, too, leaves the weights as they are now; to gather those of a sharded model
        # all ranks must have come here.
        together = sys.exc_info()[0] in (None, FloatingPointError)
        if together or not is_sharded(trainer.policy.model):
            _checkpoint(trainer, run)
    console.print("evaluating after training ...")
    evaluations.append(("after", _measure(trainer, done, run)))
    console.print(sample_table(evaluations[-1][1].samples, title="samples after training"))
    _report(config, evaluations, console)


def _checkpoint(trainer: Trainer, run: RunFolder | None) -> None:
    model = trainer.policy.model
    weights = whole_weights(model, keep=trainer.world.is_main) if is_sharded(model) else None
    if run:
        run.checkpoint(model, trainer.tokenizer, weights)


def _report(config: Config, evaluations: list[tuple[str, Evaluation]], console: Console) -> None:
    title = f"{config.evaluation.split} accuracy (95 % intervals over questions)"
    console.print(accuracy_table(evaluations, title=title))
    change, interval = gain(evaluations[0][1], evaluations[-1][1])
    console.print(
        f"change of avg@{config.evaluation.samples} over training: {change:+.3f} ± {interval:.3f}"
    )


def main(argv: list[str]) -> int:
    """`hsd train RECIPE ...`; returns the exit code."""
    config, dry_run = parse_arguments(argv, prog="hsd train")
    shown = json.dumps(to_dict(config), indent=2)
    if dry_run:
        print(shown)
        return 0
    world = join_world()
    console = Console(quiet=not world.is_main)
    console.print_json(shown)
    try:
        train(config, world, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except UnusableInput as error:
        fail(str(error))
    except (FloatingPointError, EngineError) as error:
        console.print(f"[red]stopped: {error}; the checkpoint has the last good weights")
        return 1
    finally:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
