"""The parts of a run, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from rich.console import Console

from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.peers import PeerPolicy
from hsd.data.questions import require_solutions
from hsd.data.tasks import Task, load_task
from hsd.data.verify.pool import VerifierPool
from hsd.distributed.load import load_sharded
from hsd.distributed.process import World, sharding_device, sharding_mesh
from hsd.policy.adapters import add_adapters
from hsd.policy.attention import with_packing
from hsd.policy.head import output_head
from hsd.policy.layers import checkpoint_activations, compile_layers
from hsd.policy.load import load_policy, load_tokenizer, policy_directory
from hsd.policy.optimizer import adamw
from hsd.policy.precision import compute_dtype
from hsd.policy.teachers import Policy, adapters_for, make_adapted_policy, make_policy
from hsd.rollout.engines import check_engine, make_engine
from hsd.rollout.groups import GroupSampler
from hsd.rollout.protocol import RolloutEngine, Sampling
from hsd.rollout.replay import Replay
from hsd.warmup import warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        return _sampling(self.config)

    @property
    def sampler(self) -> GroupSampler:
        return GroupSampler(
            config=self.config,
            engine=self.engine,
            tokenizer=self.tokenizer,
            contexts=self.contexts,
            judge=self.verifiers.judge,
            sampling=self.sampling,
            world=self.world,
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
    for line in (*task.notes, task.sandbox):
        if line:
            console.print(line, markup=False)
    if config.context.show_demonstration:
        require_solutions(task.train, option="context.show_demonstration")
    sampled, tokenizer, policy = _models(config, world, task, console, resumed=resumed)
    policy = with_packing(policy, config.packing)
    contexts = ContextBuilder(tokenizer, config.context)
    recorded: Replay | None = None
    if replay is not None:
        vocab_size = policy.head.weight.shape[0]
        recorded = Replay(replay, seed=config.seed, vocab_size=vocab_size)
    prompt = contexts.student(task.train[0])
    return Trainer(
        config=config,
        task=task,
        policy=policy,
        tokenizer=tokenizer,
        contexts=contexts,
        peers=PeerPolicy(config.peers, seed=config.seed),
        engine=recorded
        or _checked_engine(config, sampled, policy, tokenizer, prompt, world, console),
        verifiers=recorded
        or VerifierPool(
            task.verify,
            workers=config.verifier.workers or world.share_of_cores(),
            timeout=config.verifier.timeout,
        ),
        optimizer=adamw(
            policy.model.parameters(),
            config.optimizer.learning_rate,
            on_host=config.sharding.offload == "optimizer",
        ),
        world=world,
    )


def _checked_engine(
    config: Config,
    sampled: PreTrainedModel,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    world: World,
    console: Console,
) -> RolloutEngine:
    """The engine of a run, which agrees with the policy on rollouts of a prompt."""
    sampling = _sampling(config)
    engine = make_engine(config, sampled, tokenizer, sampling=sampling, world=world)
    try:
        gap = check_engine(
            engine, policy, prompt, sampling=sampling, tolerance=config.engine.tolerance
        )
    except BaseException:
        engine.close()
        raise
    console.print(f"engine {config.engine.kind}: log-probs {gap:.2g} nats from the trainer's")
    return engine


def _models(
    config: Config, world: World, task: Task, console: Console, *, resumed: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Policy]:
    """The model whose weights the engine takes first, its tokenizer, and the policy with teachers.

    Both models are one, but where a sharded policy is sampled in this process: the engine then
    holds a whole copy of its own.
    """
    dtype = compute_dtype(config.model.compute_dtype)
    if config.sharding.mode == "full":
        load = partial(
            load_sharded,
            world.main_first(lambda: policy_directory(config.model.name)),
            config.sharding,
            sharding_mesh(),
            compute_dtype=dtype,
        )
        policy = sharded_policy(config, load, dtype)
        if config.engine.kind != "hf":
            return policy.model, load_tokenizer(config.model.name), policy
        copy, tokenizer = world.main_first(lambda: load_policy(config.model.name))
        cast(torch.nn.Module, copy).to(sharding_device())
        return copy, tokenizer, policy
    model, tokenizer = world.main_first(lambda: load_policy(config.model.name))
    if config.warmup.steps and not resumed:
        head = output_head(model)
        world.main_first(
            lambda: warm_up(
                config, model, tokenizer, head, task.train, compute_dtype=dtype, console=console
            )
        )
    return model, tokenizer, whole_policy(config, model, dtype)


def whole_policy(
    config: Config,
    model: PreTrainedModel,
    dtype: torch.dtype,
    copy_of: Callable[[PreTrainedModel, bool], PreTrainedModel] | None = None,
) -> Policy:
    """A policy that is whole on each rank, with copies as `make_policy` makes them.

    With `config.adapter` there are none.
    """
    if config.adapter.rank:
        add_adapters(model, adapters_for(config.adapter, config.objective, seed=config.seed))
        policy = make_adapted_policy(model, config.objective, compute_dtype=dtype)
    else:
        policy = make_policy(model, config.objective, compute_dtype=dtype, copy_of=copy_of)
    # After the copies were made: they keep nothing for a backward.
    if config.sharding.activation_checkpointing:
        checkpoint_activations(model)
    if config.sharding.compile_layers:
        compile_layers(model)
    return policy


def sharded_policy(
    config: Config, load: Callable[..., PreTrainedModel], dtype: torch.dtype
) -> Policy:
    """A policy of shards.

    Args:
        load: `load_sharded` of the model, to be called once for each model with what differs:
            `frozen`, and the dtype of its weights; with adapters once.
    """
    if config.adapter.rank:
        adapters = adapters_for(config.adapter, config.objective, seed=config.seed)
        return make_adapted_policy(load(adapters=adapters), config.objective, compute_dtype=dtype)
    return make_policy(
        load(),
        config.objective,
        compute_dtype=dtype,
        # Gathered in the compute dtype anyway: what never moves is kept in it.
        copy_of=lambda _, moves: load(frozen=True, dtype=torch.float32 if moves else dtype),
    )


def _sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )
