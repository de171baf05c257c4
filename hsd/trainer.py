"""The parts of a run, built from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.peers import PeerPolicy
from hsd.data.questions import require_solutions
from hsd.data.tasks import Task, load_task
from hsd.data.verify.pool import VerifierPool
from hsd.distributed.process import World
from hsd.policy.head import output_head
from hsd.policy.load import load_policy
from hsd.policy.optimizer import adamw
from hsd.policy.precision import compute_dtype
from hsd.policy.teachers import Policy, make_policy
from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import RolloutEngine, Sampling
from hsd.rollout.replay import Replay
from hsd.warmup import warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The parts of a run that every step uses."""

    config: Config
    task: Task
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    contexts: ContextBuilder
    peers: PeerPolicy
    engine: RolloutEngine
    verifiers: VerifierPool | Replay
    optimizer: torch.optim.Optimizer
    world: World

    @property
    def sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )


def prepare(
    config: Config,
    world: World,
    console: Console,
    *,
    replay: Path | None = None,
    resumed: bool = False,
) -> Trainer:
    """Loads task and model, warms the model up, and starts the engine.

    Args:
        replay: recorded rollouts that take the place of engine and verifiers.
        resumed: a checkpoint's weights will take the place of the warmed-up ones.
    """
    task = load_task(config.task)
    if not getattr(task, config.evaluation.split):
        raise ValueError(
            f"evaluation.split: found no question in {config.evaluation.split}, expected some"
        )
    if task.sandbox:
        console.print(task.sandbox)
    if config.context.show_demonstration:
        require_solutions(task.train, option="context.show_demonstration")
    model, tokenizer = world.main_first(lambda: load_policy(config.model.name))
    contexts = ContextBuilder(tokenizer, config.context)
    dtype = compute_dtype(config.model.compute_dtype)
    head = output_head(model)
    if config.warmup.steps and not resumed:
        world.main_first(
            lambda: warm_up(
                config, model, tokenizer, head, task.train, compute_dtype=dtype, console=console
            )
        )
    recorded = None
    if replay is not None:
        recorded = Replay(replay, seed=config.seed, vocab_size=head.weight.shape[0])
    return Trainer(
        config=config,
        task=task,
        policy=make_policy(model, config.objective, compute_dtype=dtype),
        tokenizer=tokenizer,
        contexts=contexts,
        peers=PeerPolicy(config.peers, seed=config.seed),
        engine=recorded
        or HfEngine(model, tokenizer, compute_dtype=dtype, batch_rows=config.rollout.batch_rows),
        verifiers=recorded
        or VerifierPool(
            task.verify,
            workers=config.verifier.workers or world.share_of_cores(),
            timeout=config.verifier.timeout,
        ),
        optimizer=adamw(model.parameters(), config.optimizer.learning_rate),
        world=world,
    )
