"""`hsd eval`: accuracy of a checkpoint, or of any model, on a split of a task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from hsd.checks import require, require_folder
from hsd.completions import Completions, settings_key
from hsd.config import Config
from hsd.data.contexts import ContextBuilder
from hsd.data.tasks import load_task
from hsd.data.verify.pool import VerifierPool
from hsd.distributed.process import World
from hsd.evaluate import accuracy_table, evaluate
from hsd.metrics import finite, sample_table
from hsd.policy.load import load_policy, model_identity
from hsd.recipe import (
    fail,
    load_recipe,
    parse_flags,
    recorded_config,
    take_engine_flags,
    to_dict,
    with_engine_flags,
)
from hsd.rollout.engines import make_lone_engine
from hsd.rollout.protocol import Sampling
from hsd.scores import Evaluation


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Evaluate the checkpoint of a run on its task, or any model on the task of a recipe.

    Samples with the engine of the run or recipe; --engine.NAME VALUE changes it, as in hsd train.

    Args:
        run: a run folder, as hsd train leaves it, or a recipe.
        split: of the run's task.
        samples: k of avg@k and pass@k.
        temperature: of sampling; 0 is greedy, with one sample.
        greedy: measure the most likely response too.
        seed: of sampling.
        limit: only the first questions of the split.
        model: evaluate this model instead of the run's checkpoint or the recipe's model: a
            directory or hub name.
        show_samples: completions to show.
        output: folder for all completions, a JSONL file per evaluation, which a later call with
            the same settings continues; default: `evaluations` in the run, and of a recipe its
            name in `evaluations` here.
    """

    run: Annotated[Path, tyro.conf.Positional]
    split: Literal["train", "validation", "heldout"] = "heldout"
    samples: int = 8
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    limit: int | None = None
    model: str | None = None
    show_samples: int = 4
    output: Path | None = None


def main(argv: list[str]) -> int:
    """`hsd eval RUN ...`; returns the exit code."""
    flags, words = take_engine_flags(argv)
    arguments = parse_flags(EvalArguments, words, prog="hsd eval")
    try:
        _evaluate_run(arguments, flags)
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


def _evaluate_run(arguments: EvalArguments, engine_flags: Sequence[str]) -> None:
    _check(arguments)
    config, name, folder = _what_to_evaluate(arguments)
    require_folder("--output", folder)
    config = with_engine_flags(config, engine_flags, prog="hsd eval")
    model, tokenizer = load_policy(name)
    task = load_task(config.task)
    questions = getattr(task, arguments.split)[: arguments.limit]
    if not questions:
        raise ValueError(f"split: found no question in {arguments.split}, expected some")
    console = Console()
    settings = _settings(config, arguments) | {"model": model_identity(name)}
    for line in (*task.notes, task.sandbox):
        if line:
            console.print(line, markup=False)
    passes = [(arguments.temperature, arguments.samples)]
    if arguments.greedy and arguments.temperature > 0:
        passes.append((0.0, 1))
    verifier = config.verifier
    engine = make_lone_engine(config, model, tokenizer)
    with (
        closing(engine),
        VerifierPool(task.verify, workers=verifier.workers, timeout=verifier.timeout) as pool,
    ):
        for temperature, samples in passes:
            settings |= {"temperature": temperature, "samples": samples}
            path = folder / f"{arguments.split}-{settings_key(settings)}.jsonl"
            with closing(Completions(path, settings)) as completions:
                result = evaluate(
                    engine,
                    tokenizer,
                    ContextBuilder(tokenizer, config.context),
                    questions,
                    pool.judge,
                    sampling=Sampling(
                        max_new_tokens=config.rollout.max_new_tokens,
                        temperature=temperature,
                        top_p=config.rollout.top_p,
                    ),
                    samples=samples,
                    seed=arguments.seed,
                    world=World(rank=0, size=1),
                    shown=arguments.show_samples,
                    completions=completions,
                    questions_per_round=max(1, config.rollout.batch_rows // samples),
                )
            title = f"{arguments.split} questions, temperature {temperature:g}"
            _report(console, name, result, title=title)
            record = {key: finite(value) for key, value in result.record().items()}
            summary = path.with_suffix(".json")
            summary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            console.print(f"completions: {path}", soft_wrap=True)
    if pool.last_error:
        console.print(f"a verifier failed: {pool.last_error}", markup=False)


def _check(arguments: EvalArguments) -> None:
    for name, value, lowest in (
        ("samples", arguments.samples, 1),
        ("temperature", arguments.temperature, 0),
        ("limit", arguments.limit, 1),
        ("show-samples", arguments.show_samples, 0),
    ):
        require(name, value, value is None or value >= lowest, f"at least {lowest}")
    alone = arguments.temperature > 0 or arguments.samples == 1
    require("samples", arguments.samples, alone, "1 with temperature 0")


def _what_to_evaluate(arguments: EvalArguments) -> tuple[Config, str, Path]:
    """The configuration, the model's name and the folder for the completions."""
    source, output = arguments.run, arguments.output
    if source.is_file():
        config = load_recipe(source)
        folder = output or Path("evaluations") / source.stem
        return config, arguments.model or config.model.name, folder
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such run folder and no such recipe")
    config = recorded_config(source / "config.json")
    checkpoint = source / "checkpoint"
    if arguments.model is None and not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint in this run, expected one")
    return config, arguments.model or str(checkpoint), output or source / "evaluations"


def _settings(config: Config, arguments: EvalArguments) -> dict[str, Any]:
    """All that the samples depend on but for the model and how many there are."""
    values = to_dict(config)
    return {
        "task": values["task"],
        "split": arguments.split,
        "seed": arguments.seed,
        "max_new_tokens": config.rollout.max_new_tokens,
        "top_p": config.rollout.top_p,
        "template": config.context.template,
        "system": config.context.system,
        "student_thinking": config.context.student_thinking,
        "compute_dtype": config.model.compute_dtype,
        "engine": config.engine.kind,
        "torch": torch.__version__,
    }


def _report(console: Console, name: str, result: Evaluation, *, title: str) -> None:
    if result.samples:
        console.print(sample_table(result.samples, title="samples"))
    console.print(accuracy_table([(name, result)], title=title))
    record = result.record()
    passed = ", ".join(f"pass@{k} {value:.3f}" for k, value in record["pass_at"].items())
    console.print(passed, highlight=False)
    console.print(
        f"length {record['length']:.1f} tokens, truncated {record['truncated_share']:.1%}, "
        f"repeated 4-grams {record['repetition']:.1%}, "
        f"not judged {record['error_share']:.1%}",
        highlight=False,
    )
