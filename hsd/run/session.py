"""A run in progress: its trainer, its folder, where it is, and what is done between its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from hsd.distributed.checkpoint import Checkpoints
from hsd.distributed.fsdp import is_sharded, whole_weights
from hsd.evaluate import evaluate
from hsd.logs.completions import completion_rows, completions_table
from hsd.metrics import sample_table
from hsd.objective.batch import JudgedRollout
from hsd.policy.adapters import has_adapters
from hsd.rollout.groups import Group
from hsd.run.folder import RunFolder
from hsd.run.launch import Launch
from hsd.run.resume import Position, Questions, own_state, shared_state, tensors_of
from hsd.run.stopping import Stopping
from hsd.scores import Evaluation
from hsd.trainer import Trainer


@dataclass(kw_only=True)
class Session:
    """What a run has beside its trainer.

    Attributes:
        run: its folder, on the main rank.
        between: the trainer is between two steps on every rank: its state can be saved.
    """

    launch: Launch
    trainer: Trainer
    run: RunFolder | None
    console: Console
    checkpoints: Checkpoints
    position: Position
    questions: Questions
    stopping: Stopping
    between: bool = True

    def save(self) -> None:
        """A checkpoint to resume from."""
        moving, still = tensors_of(self.trainer)
        self.checkpoints.save(
            self.position.step,
            moving,
            still=still,
            shared=shared_state(self.trainer, self.position),
            own=own_state(),
        )

    def export(self) -> None:
        """The weights as they are now, for from_pretrained; every rank takes part if sharded."""
        trainer = self.trainer
        model = trainer.policy.model
        weights = None
        if is_sharded(model) or has_adapters(model):
            weights = whole_weights(model, keep=trainer.world.is_main)
        if self.run:
            self.run.checkpoint(model, trainer.tokenizer, weights)

    def show_completions(
        self, step: int, judged: Sequence[tuple[Group, Sequence[JudgedRollout]]]
    ) -> None:
        """Some rollouts of a step, as a table and for the trackers."""
        rows = completion_rows(judged, self.trainer.config.show_samples)
        self.console.print(completions_table(rows, title=f"rollouts of step {step}"))
        if self.run:
            self.run.completions(step, rows)

    def evaluate_if_due(self) -> None:
        """Accuracy before training, and every few steps."""
        done, config = self.position.step, self.trainer.config
        every = config.evaluation.every
        if done == 0:
            self.evaluate("before")
        elif every and done % every == 0 and done < config.steps:
            self.evaluate(f"step {done}")

    def evaluate(self, name: str) -> None:
        """Accuracy on the evaluation split, recorded; not twice, and not without an engine."""
        done = [each for each, _ in self.position.evaluations]
        if name in done or self.launch.replay:
            return
        # One rank must not leave an evaluation that the others go on with.
        self.stopping.hold = not self.between
        self.console.print(f"evaluating: {name} ...")
        started = time.perf_counter()
        result = _measure(self.trainer)
        self.stopping.hold = True
        if self.run:
            split, seconds = self.trainer.config.evaluation.split, time.perf_counter() - started
            record = {"split": split, **result.record(), "seconds": seconds}
            self.run.metrics("evaluation", self.position.step, record)
            self.position.files = self.run.position()
        self.position.evaluations.append((name, result))
        if name in ("before", "after"):
            title = f"samples {name} training"
            self.console.print(sample_table(result.samples, title=title))
        if self.between:
            self.stopping.check(self.trainer.world)


def _measure(trainer: Trainer) -> Evaluation:
    """Accuracy on the evaluation split."""
    config = trainer.config
    return evaluate(
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
