"""Accuracy of a policy on a split of a task: avg@k and pass@k with intervals over questions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.questions import Question
from hsd.data.tasks import load_task
from hsd.data.verify import Verifier
from hsd.distributed.process import World
from hsd.metrics import sample_table
from hsd.recipe import config_from_dict, fail, parse_flags
from hsd.rollout.protocol import RolloutEngine, Sampling, response_text, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Outcomes of k samples on each question.

    Attributes:
        correct: (questions, k) bool.
        samples: (prompt, answer, response, correct) of the first completion of some questions.
        tokens: generated in all.
    """

    correct: Tensor
    samples: Sequence[tuple[str, str, str, bool]]
    tokens: int

    @property
    def average(self) -> float:
        """avg@k: the expected accuracy of one sample."""
        return float(self.correct.double().mean())

    @property
    def average_interval(self) -> float:
        """Half width of avg@k's 95 % interval, over questions."""
        return half_width(self.correct.double().mean(1))

    @property
    def any_correct(self) -> float:
        """pass@k: the share of questions with at least one correct sample."""
        return float(self.correct.any(1).double().mean())

    @property
    def any_correct_interval(self) -> float:
        """Half width of pass@k's 95 % interval, over questions."""
        return half_width(self.correct.any(1).double())


def half_width(per_question: Tensor) -> float:
    """Half width of the normal 95 % interval of a mean over questions, (Q,) -> float."""
    count = per_question.numel()
    return 1.96 * float(per_question.std()) / math.sqrt(count) if count > 1 else math.inf


def gain(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Change of avg@k and the half width of its 95 % interval, paired by question."""
    difference = after.correct.double().mean(1) - before.correct.double().mean(1)
    return float(difference.mean()), half_width(difference)


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: ContextBuilder,
    questions: Sequence[Question],
    verify: Verifier,
    *,
    sampling: Sampling,
    samples: int,
    seed: int,
    world: World,
    shown: int = 0,
) -> Evaluation:
    """Samples k responses to each question and verifies them; ranks share the questions."""
    own = world.share(questions)
    groups = engine.generate(
        [prompts.student(question) for question in own],
        seeds=[stream_seed("evaluation", seed, question.id) for question in own],
        group_size=samples,
        sampling=sampling,
    )
    texts = [[response_text(tokenizer, rollout) for rollout in group] for group in groups]
    outcomes = torch.zeros((len(questions), samples))
    for position, (question, group) in enumerate(zip(own, texts, strict=True)):
        row = world.rank + position * world.size
        outcomes[row] = torch.tensor([float(verify(question, text)) for text in group])
    tokens = torch.tensor(sum(len(r.token_ids) for group in groups for r in group))
    return Evaluation(
        correct=world.sum_(outcomes).bool(),
        samples=[
            (question.prompt, question.answer, group[0], verify(question, group[0]))
            for question, group in zip(own[:shown], texts, strict=False)
        ],
        tokens=int(world.sum_(tokens)),
    )


def accuracy_table(rows: Sequence[tuple[str, Evaluation]], *, title: str) -> Table:
    """avg@k and pass@k with their 95 % intervals, a line each."""
    samples = rows[0][1].correct.shape[1]
    table = Table(title=title, title_justify="left")
    for column in ("", f"avg@{samples}", f"pass@{samples}", "questions"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, result in rows:
        table.add_row(
            name,
            f"{result.average:.3f} ± {result.average_interval:.3f}",
            f"{result.any_correct:.3f} ± {result.any_correct_interval:.3f}",
            str(len(result.correct)),
        )
    return table


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Evaluate the checkpoint of a run on its task.

    Args:
        run: a run folder, as hsd train leaves it.
        split: of the run's task.
        samples: k of avg@k and pass@k.
        temperature: of sampling; 0 is greedy, with one sample.
        seed: of sampling.
        limit: only the first questions of the split.
        model: evaluate this model instead of the checkpoint: a directory or hub name.
        show_samples: completions to show.
    """

    run: Annotated[Path, tyro.conf.Positional]
    split: Literal["train", "validation", "heldout"] = "heldout"
    samples: int = 8
    temperature: float = 1.0
    seed: int = 0
    limit: int | None = None
    model: str | None = None
    show_samples: int = 4


def main(argv: list[str]) -> int:
    """`hsd eval RUN ...`; returns the exit code."""
    arguments = parse_flags(EvalArguments, argv, prog="hsd eval")
    try:
        _evaluate_run(arguments)
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


def recorded_config(path: Path) -> Config:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a run folder of hsd train")
    try:
        return config_from_dict(json.loads(path.read_bytes())["config"], source=str(path))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise ValueError(f"{path}: found no configuration, expected hsd train's file") from None


def _evaluate_run(arguments: EvalArguments) -> None:
    from hsd.policy.load import load_policy
    from hsd.policy.precision import compute_dtype
    from hsd.rollout.hf import HfEngine

    for name, value, lowest in (
        ("samples", arguments.samples, 1),
        ("temperature", arguments.temperature, 0),
        ("limit", arguments.limit, 1),
    ):
        if value is not None and value < lowest:
            raise ValueError(f"{name}: found {value}, expected at least {lowest}")
    if arguments.temperature == 0 and arguments.samples != 1:
        raise ValueError(f"samples: found {arguments.samples}, expected 1 with temperature 0")
    config = recorded_config(arguments.run / "config.json")
    checkpoint = arguments.run / "checkpoint"
    if arguments.model is None and not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint in this run, expected one")
    model, tokenizer = load_policy(arguments.model or str(checkpoint))
    task = load_task(config.task)
    questions = getattr(task, arguments.split)[: arguments.limit]
    if not questions:
        raise ValueError(f"split: found no question in {arguments.split}, expected some")
    sampling = Sampling(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=arguments.temperature,
        top_p=config.rollout.top_p,
    )
    engine = HfEngine(
        model,
        tokenizer,
        compute_dtype=compute_dtype(config.model.compute_dtype),
        batch_rows=config.rollout.batch_rows,
    )
    result = evaluate(
        engine,
        tokenizer,
        ContextBuilder(tokenizer, config.context),
        questions,
        task.verify,
        sampling=sampling,
        samples=arguments.samples,
        seed=arguments.seed,
        world=World(rank=0, size=1),
        shown=arguments.show_samples,
    )
    console = Console()
    if result.samples:
        console.print(sample_table(result.samples, title="samples"))
    title = f"{arguments.split} questions, temperature {arguments.temperature:g}"
    console.print(accuracy_table([(str(arguments.model or checkpoint), result)], title=title))
