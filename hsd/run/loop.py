"""A run: evaluation, steps, evaluation; checkpoints between them, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from pathlib import Path

from rich.console import Console

from hsd.distributed.checkpoint import Checkpoints, whole_checkpoints
from hsd.distributed.failure import is_first_to_fail, leave_at_once, lost_another_rank
from hsd.distributed.process import World, join_world, leave_world
from hsd.evaluate import accuracy_table
from hsd.metrics import StepProgress
from hsd.policy.load import cache_directory
from hsd.recipe import fail, print_error, to_dict
from hsd.rollout.protocol import EngineError
from hsd.rollout.replay import ReplayError
from hsd.run.disk import disk_full
from hsd.run.folder import STATES, RunFolder
from hsd.run.launch import Launch, parse_launch
from hsd.run.lock import FolderLock
from hsd.run.profiling import profiled
from hsd.run.resume import Position, Questions, read_position, restore
from hsd.run.session import Session
from hsd.run.stopping import Stopped, Stopping
from hsd.scores import gain
from hsd.train import NotFinite, train_step
from hsd.trainer import prepare


class UnusableInput(ValueError):
    """Task, model, run folder or replay cannot be used; the message says why."""


def train(launch: Launch, world: World, console: Console) -> None:
    """A whole run, or the rest of one; what it leaves is in its folder.

    Raises:
        UnusableInput: before the first evaluation.
        NotFinite: too many updates in a row were not finite; the checkpoint has the last good
            weights.
        Stopped: a signal came; there is a checkpoint to resume from.
    """
    config = launch.config
    path = config.run_dir or Path("runs") / "run"
    if config.rollout.top_p < 1:
        console.print("[yellow]rollout.top_p < 1: peers are no exact samples of the policy")
    with Stopping() as stopping, FolderLock(path) as lock:
        session = _start(launch, path, world, console, stopping, lock)
        try:
            _guarded(session)
        finally:
            trainer = session.trainer
            trainer.engine.close()
            trainer.verifiers.close()
            if trainer.verifiers.last_error:
                console.print(f"a verifier failed: {trainer.verifiers.last_error}", markup=False)
            if session.run:
                session.run.close()
                console.print(f"run folder: {path}")


def _start(
    launch: Launch,
    path: Path,
    world: World,
    console: Console,
    stopping: Stopping,
    lock: FolderLock,
) -> Session:
    config, run = launch.config, None
    try:
        if launch.resume and world.is_main:
            lock.take()
        world.barrier()  # nobody looks at what another job may still change
        whole = whole_checkpoints(path / STATES) if launch.resume else []
        position = read_position(whole[-1][1]) if whole else Position()
        if launch.resume:
            console.print(f"resuming {path} after step {position.step}", markup=False)
        world.barrier()  # all ranks have looked
        if world.is_main:
            files = position.files if launch.resume else None
            run = RunFolder(path, config, lock=lock, resume=files, done=position.step)
        trainer = prepare(
            config, world, console, replay=launch.replay, resumed=launch.resume and bool(whole)
        )
        if whole:
            restore(trainer, whole[-1][1])
    except BaseException as error:
        if run and not launch.resume:
            run.discard()
        if full := disk_full(error):
            found = f"found a full disk ({full}), expected room in {path} and {cache_directory()}"
            raise UnusableInput(found) from error
        if isinstance(error, ValueError | OSError):
            raise UnusableInput(str(error)) from error
        raise
    world.barrier()  # the folder is there
    return Session(
        launch=launch,
        trainer=trainer,
        run=run,
        console=console,
        checkpoints=Checkpoints(path / STATES, world, keep=config.recovery.keep),
        position=position,
        questions=Questions(trainer.task.train, config.seed, drawn=position.drawn),
        stopping=stopping,
    )


def _guarded(session: Session) -> None:
    """The steps; where they end early, what can be kept is kept."""
    finished = together = False
    try:
        _steps(session)
        finished = together = True
    except NotFinite as error:
        together = True
        if session.run:
            file = session.run.dump(session.position.step + 1, error.judged)
            session.console.print(f"the rollouts of the step: {file}", markup=False)
        if error.first:
            session.save()
        raise
    except Stopped:
        # Between two steps all ranks are here; else the last checkpoint has to do.
        together = session.between
        if session.between:
            session.stopping.hold = True
            session.save()
        raise
    finally:
        if together:
            session.checkpoints.close()
        if not finished and (together or session.trainer.world.size == 1):
            session.export()


def _steps(session: Session) -> None:
    config, position, stopping = session.trainer.config, session.position, session.stopping
    world = session.trainer.world
    alone = world.size == 1
    session.between = alone
    session.evaluate_if_due()
    with StepProgress(
        session.console, steps=config.steps, label="training", done=position.step
    ) as progress:
        while position.step < config.steps:
            stopping.hold, session.between = True, False
            metrics = _step(session)
            progress.advance(metrics, step=position.step)
            done, last = position.step, position.step == config.steps
            session.between = True
            if config.checkpoint_every and done % config.checkpoint_every == 0:
                session.save()
                if not last:
                    session.export()
            stopping.check(world)
            session.between = alone
            stopping.hold = not alone
            session.evaluate_if_due()
    session.export()
    session.evaluate("after")
    session.between, stopping.hold = True, True
    _report(session)
    stopping.check(world)
    session.checkpoints.wait()
    if session.run:
        session.run.finish()


def _step(session: Session) -> dict[str, float]:
    """One step, recorded; the position behind it."""
    trainer, position, launch = session.trainer, session.position, session.launch
    step, limit = position.step, trainer.config.recovery.max_skipped_steps
    traced = contextlib.nullcontext()
    path = trainer.config.run_dir
    # Not the first step, which has first calls of everything, if there is another.
    if launch.profile and path and step == min(1, trainer.config.steps - 1):
        traced = profiled(path / "profile", rank=trainer.world.rank)  # type: ignore[assignment]
    with traced:
        metrics, judged = train_step(
            trainer, session.questions, step, may_skip=position.skipped < limit
        )
    if session.run:
        session.run.metrics("step", step + 1, metrics)
        for group, outcomes in judged:
            session.run.rollouts(step + 1, group, outcomes)
    shown = trainer.config.logging.completions_every
    if shown and (step + 1) % shown == 0:
        session.show_completions(step + 1, judged)
    if session.run:
        position.files = session.run.position()
    position.step = step + 1
    position.drawn = session.questions.drawn
    position.skipped = position.skipped + 1 if metrics["skipped_updates"] else 0
    return metrics


def _report(session: Session) -> None:
    evaluations = session.position.evaluations
    if not evaluations:
        return
    config = session.trainer.config
    title = f"{config.evaluation.split} accuracy (95 % intervals over questions)"
    session.console.print(accuracy_table(evaluations, title=title))
    change, interval = gain(evaluations[0][1], evaluations[-1][1])
    session.console.print(
        f"change of avg@{config.evaluation.samples} over training: {change:+.3f} ± {interval:.3f}"
    )


def run(argv: list[str]) -> int:
    """`hsd train ...`; returns the exit code."""
    launch = parse_launch(argv, prog="hsd train")
    shown = json.dumps(to_dict(launch.config), indent=2)
    if launch.dry_run:
        print(shown)
        return 0
    try:
        world = join_world()
    except ValueError as error:
        size = os.environ["WORLD_SIZE"]
        fail(f"WORLD_SIZE: found {size!r}, expected none, or torchrun's environment ({error})")
    console = Console(quiet=not world.is_main)
    console.print_json(shown)
    code = _run(launch, world, console)
    if code and world.size > 1:
        leave_at_once(code)
    leave_world()
    return code


def _run(launch: Launch, world: World, console: Console) -> int:
    try:
        train(launch, world, console)
    except Stopped as stop:
        kept = "`hsd train --resume` goes on from here" if stop.agreed or world.size == 1 else ""
        console.print(f"interrupted; {kept}")
        return stop.exit_code
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except UnusableInput as error:
        if is_first_to_fail():
            print_error(str(error))
        return 2
    except (NotFinite, ReplayError, EngineError) as error:
        if is_first_to_fail():  # maybe not the main rank, whose console alone is not quiet
            stopped = f"[red]stopped: {error}; the checkpoint has the last good weights"
            Console().print(stopped)
        return 1
    except Exception as error:
        full = disk_full(error)
        if world.size == 1 and not full:
            raise
        if is_first_to_fail():
            if full:
                print_error(f"{full}; the last checkpoint can be resumed once there is room")
            elif lost_another_rank(error):
                print_error(f"rank {world.rank} lost another rank")
            else:
                traceback.print_exc()
        return 1
    return 0
