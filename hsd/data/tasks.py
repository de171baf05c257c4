"""Tasks: the questions of a run, split, with their verifier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsd.data import arithmetic, gym, hub, human_eval, mixture
from hsd.data.questions import Question, load_jsonl
from hsd.data.sandbox import local
from hsd.data.sandbox.local import Mechanism
from hsd.data.splits import cut, drop_measured, hold_out, require_disjoint
from hsd.data.task_configs import (
    ArithmeticTask,
    HuggingFaceTask,
    HumanEvalTask,
    JsonlTask,
    ReasoningGymMixtureTask,
    TaskConfig,
    total,
)
from hsd.data.verify import VERIFIERS, Verifier, by_path, code
from hsd.data.verify.match import last_number


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions and their verifier. No prompt is in two splits, white space and case aside.

    Attributes:
        notes: a line each on what was held out or dropped, for the start of a run.
        sandbox: one line on what model code runs in, where the verifier runs it.
    """

    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    heldout: tuple[Question, ...]
    verify: Verifier
    sandbox: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_disjoint(self.splits)

    @property
    def splits(self) -> dict[str, tuple[Question, ...]]:
        """The three splits by name."""
        return {"train": self.train, "validation": self.validation, "heldout": self.heldout}


def load_task(config: TaskConfig) -> Task:
    """Loads or generates the questions of a task; the same config gives the same task.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a package that the task needs is not installed, a file is broken, two files
            share a prompt, the generator is unknown, cannot take its options or has too few
            distinct questions, there is no such verifier, or the sandbox is weaker than it must be.
    """
    if isinstance(config, JsonlTask):
        return _load_jsonl_task(config)
    if isinstance(config, HuggingFaceTask):
        return _load_huggingface_task(config)
    if isinstance(config, ReasoningGymMixtureTask):
        splits, verify = mixture.generate(config)
        return _task(splits, verify)
    sandbox = None
    if isinstance(config, ArithmeticTask):
        questions = _arithmetic_questions(config)
        verify = VERIFIERS["numeric"]
    elif isinstance(config, HumanEvalTask):
        questions = human_eval.load(seed=config.seed)[: total(config)]
        verify, sandbox = _code_verifier(config.sandbox)
    else:
        questions, verify = gym.generate(
            dataset=config.dataset,
            options=config.options,
            seed=config.seed,
            count=total(config),
        )
    splits = cut(
        questions, heldout=config.heldout_questions, validation=config.validation_questions
    )
    return _task(splits, verify, sandbox=sandbox)


def _task(
    splits: Mapping[str, tuple[Question, ...]],
    verify: Verifier,
    *,
    sandbox: str | None = None,
    notes: tuple[str, ...] = (),
) -> Task:
    return Task(
        train=splits["train"],
        validation=splits["validation"],
        heldout=splits["heldout"],
        verify=verify,
        sandbox=sandbox,
        notes=notes,
    )


def _arithmetic_questions(config: ArithmeticTask) -> list[Question]:
    kind, terms, digits = config.kind, config.terms, config.digits
    size = arithmetic.space_size(kind=kind, terms=terms, digits=digits)
    if total(config) > size:
        raise ValueError(
            f"task.train_questions: found {total(config)} questions in the three splits, expected "
            f"at most {size}, all there are with task.terms {terms} and task.digits {digits}"
        )
    return arithmetic.generate(
        kind=kind, terms=terms, digits=digits, seed=config.seed, count=total(config)
    )


def _code_verifier(minimum: Mechanism) -> tuple[Verifier, str]:
    sandbox = local.require(minimum)
    return code.unit_tests(sandbox), local.statement(sandbox)


def _named_verifier(name: str) -> Verifier:
    """The verifier of questions with an answer: by comparison, or one's own."""
    if name == "math":
        try:
            from hsd.data.verify import math_answer
        except ImportError:
            raise ValueError(
                "task.verifier: found math, which needs math-verify, "
                'expected: pip install "hsd-kernels[train]"'
            ) from None
        return math_answer.equivalent
    return by_path.load(name) if ":" in name else VERIFIERS[name]


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
    for name, questions in splits.items():
        for question in questions:
            _require_verifiable(question, name, config.verifier)
    # The files are the user's: a prompt in two of them is an error there, which Task raises.
    require_disjoint(splits)
    notes = _hold_out(splits, config.heldout is None, config.heldout_questions, str(config.train))
    if config.verifier == "code":
        verify, sandbox = _code_verifier(config.sandbox)
        return _task(splits, verify, sandbox=sandbox, notes=notes)
    return _task(splits, _named_verifier(config.verifier), notes=notes)


def _load_huggingface_task(config: HuggingFaceTask) -> Task:
    names = {
        "train": config.train_split,
        "validation": config.validation_split,
        "heldout": config.heldout_split,
    }
    splits = {
        key: tuple(hub.load_split(config, name)) if name is not None else ()
        for key, name in names.items()
    }
    for name, questions in splits.items():
        for question in questions:
            _require_verifiable(question, name, config.verifier)
    # Published datasets do share prompts between their splits, and a user cannot mend them.
    splits["train"], dropped = drop_measured(
        splits["train"], splits["validation"], splits["heldout"]
    )
    notes = _hold_out(
        splits, config.heldout_split is None, config.heldout_questions, config.dataset
    )
    if dropped:
        notes += (f"{dropped} training questions dropped: their prompts are in another split",)
    if not splits["train"]:
        raise ValueError("task.train_split: found no prompt outside of the other splits")
    return _task(splits, _named_verifier(config.verifier), notes=notes)


def _hold_out(
    splits: dict[str, tuple[Question, ...]], wanted: bool, count: int, source: str
) -> tuple[str, ...]:
    """Takes held-out questions from the training split where the task names no others."""
    if not wanted or not count:
        return ()
    splits["train"], splits["heldout"] = hold_out(splits["train"], count)
    held, left = len(splits["heldout"]), len(splits["train"])
    return (f"{held} questions of {source} held out, {left} left to train on",)
