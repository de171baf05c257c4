"""`hsd credit`: from rollouts to credit.jsonl, summary.json, figures and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from hsd.checks import require, require_folder
from hsd.config import Config
from hsd.credit.contexts import ContextName, CreditContexts, OtherSuccesses
from hsd.credit.export import write_export
from hsd.credit.files import Format, require_parquet
from hsd.credit.measure import measure
from hsd.credit.model import CreditModel
from hsd.credit.source import CreditGroup, read_groups, sample_groups
from hsd.data.tasks import load_task
from hsd.policy.head import output_head
from hsd.policy.load import load_policy
from hsd.policy.precision import compute_dtype
from hsd.recipe import (
    fail,
    load_recipe,
    parse_flags,
    recorded_config,
    take_engine_flags,
    with_engine_flags,
)
from hsd.rollout.engines import make_lone_engine
from hsd.rollout.protocol import Sampling

Groups = Callable[[], Iterator[CreditGroup]]


@dataclass(frozen=True, kw_only=True)
class CreditArguments:
    """Show which tokens of rollouts a teacher context gives credit to.

    A recipe samples with its engine; --engine.NAME VALUE changes it, as in hsd train.

    Args:
        source: a run folder, a rollouts.jsonl, or a recipe whose model samples rollouts of its
            task now.
        contexts: what the teacher sees: answer, peer, answer_peer, other_prompt (the answer, and
            a success of another question), none.
        out: folder for the results; must not exist or be empty.
        model: student and teacher, a directory or hub name; default: the run's checkpoint or the
            recipe's model. A rollouts.jsonl needs it.
        step: only the rollouts of this training step.
        groups: only the first groups; a recipe samples as many, 64 by default.
        compute_dtype: of activations; bfloat16 is faster and adds noise to every number.
        format: of the file of all numbers; parquet needs pyarrow.
        sidecars: keep all contexts but the first in files beside the page, which loads them when
            they are looked at. It does so by itself where it would be larger than 40 MB.
    """

    source: Annotated[Path, tyro.conf.Positional]
    contexts: tuple[ContextName, ...] = ("answer_peer", "answer")
    out: Path = Path("credit")
    model: str | None = None
    step: int | None = None
    groups: int | None = None
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    format: Format = "jsonl"
    sidecars: bool = False


def main(argv: list[str]) -> int:
    """`hsd credit SOURCE ...`; returns the exit code."""
    flags, words = take_engine_flags(argv)
    arguments = parse_flags(CreditArguments, words, prog="hsd credit")
    console = Console()
    try:
        _check(arguments)
        if flags and not _samples(arguments):
            raise ValueError(f"{flags[0]}: found beside recorded rollouts, expected a recipe")
        export(arguments, console, flags)
    except (ValueError, OSError) as error:
        fail(str(error))
    return 0


def _check(arguments: CreditArguments) -> None:
    names = arguments.contexts
    if not names or len(set(names)) < len(names):
        raise ValueError(f"contexts: found {' '.join(names) or 'none'}, expected different names")
    if not arguments.source.exists():
        raise FileNotFoundError(
            f"{arguments.source}: no such run folder, file of rollouts or recipe"
        )
    groups, step = arguments.groups, arguments.step
    require("groups", groups, groups is None or groups >= 1, "at least 1")
    require("step", step, step is None or step >= 0, "at least 0")
    if arguments.format == "parquet":
        require_parquet()
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out: found {out} in use, expected a new or empty folder")
    require_folder("--out", out)


def _samples(arguments: CreditArguments) -> bool:
    return arguments.source.suffix == ".toml" and not arguments.source.is_dir()


def export(arguments: CreditArguments, console: Console, engine_flags: Sequence[str] = ()) -> None:
    """Everything into `arguments.out`."""
    config, model_name = _config(arguments)
    config = with_engine_flags(config, engine_flags, prog="hsd credit")
    model, tokenizer = load_policy(model_name)
    head = output_head(model)
    credit_model = CreditModel(
        model=model.requires_grad_(False),
        head=head,
        tokenizer=tokenizer,
        compute_dtype=compute_dtype(arguments.compute_dtype),
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.micro_batch_tokens,
        max_chunk_bytes=config.objective.max_chunk_bytes,
    )
    contexts = CreditContexts(tokenizer, config.context, arguments.contexts)
    with ExitStack() as stack:
        groups = _groups(arguments, config, credit_model, contexts, stack)
        others = OtherSuccesses(groups() if "other_prompt" in arguments.contexts else ())
        exported = write_export(
            arguments.out,
            measure(groups(), others, credit_model, contexts, config),
            about={
                "title": arguments.source.name or "credit",
                "source": str(arguments.source),
                "model": model_name,
                "temperature": credit_model.temperature,
                "compute_dtype": arguments.compute_dtype,
                "contexts": list(arguments.contexts),
            },
            tokenizer=tokenizer,
            console=console,
            file_format=arguments.format,
            sidecars=arguments.sidecars,
        )
    numbers = exported.numbers
    console.print(
        f"{numbers['rollouts']} rollouts, {numbers['failed_with_peer']} of them failed with a peer"
    )
    if exported.shown < numbers["rollouts"]:
        console.print(f"[yellow]the page has room for the first {exported.shown} rollouts")
    for name in exported.names:
        console.print(str(arguments.out / name), highlight=False, markup=False)


def _config(arguments: CreditArguments) -> tuple[Config, str]:
    """The configuration that the source comes with, and the model's name."""
    source = arguments.source
    if source.is_dir():
        config = recorded_config(source / "config.json")
        default: str | None = str(source / "checkpoint")
        if arguments.model is None and not (source / "checkpoint").is_dir():
            raise FileNotFoundError(f"{source / 'checkpoint'}: no checkpoint, expected --model")
    elif source.suffix == ".toml":
        config = load_recipe(source)
        default = config.model.name
    else:
        config, default = Config(), None
    model = arguments.model or default
    if model is None:
        raise ValueError("model: found none, expected --model beside a file of rollouts")
    return config, model


def _groups(
    arguments: CreditArguments,
    config: Config,
    credit_model: CreditModel,
    contexts: CreditContexts,
    stack: ExitStack,
) -> Groups:
    """A function that starts over at the first group; `stack` ends what it needs."""
    source = arguments.source
    if _samples(arguments):
        if arguments.step is not None:
            raise ValueError("step: found a value, expected recorded rollouts beside it")
        return _sampler(arguments, config, credit_model, contexts, stack)
    answers: dict[str, str] = {}
    if source.is_dir():
        answers = {question.id: question.answer for question in load_task(config.task).train}
        source = source / "rollouts.jsonl"
    answer_needed = bool({"answer", "answer_peer", "other_prompt"} & set(arguments.contexts))

    def groups() -> Iterator[CreditGroup]:
        found = read_groups(
            source,
            credit_model.tokenizer,
            answers=answers,
            answer_needed=answer_needed,
            vocab_size=credit_model.head.weight.shape[0],
            seed=config.seed,
            step=arguments.step,
        )
        return islice(found, arguments.groups)

    return groups


def _sampler(
    arguments: CreditArguments,
    config: Config,
    credit_model: CreditModel,
    contexts: CreditContexts,
    stack: ExitStack,
) -> Groups:
    """Groups sampled now for questions of the recipe's evaluation split."""
    task = load_task(config.task)
    questions = getattr(task, config.evaluation.split)[: arguments.groups or 64]
    if not questions:
        raise ValueError(
            f"evaluation.split: found no question in {config.evaluation.split}, expected some"
        )
    rollout = config.rollout
    # In the dtype that the credit is measured in, whatever the recipe trains in.
    precision = replace(config.model, compute_dtype=arguments.compute_dtype)
    engine = make_lone_engine(
        replace(config, model=precision), credit_model.model, credit_model.tokenizer
    )
    stack.callback(engine.close)
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )
    return lambda: sample_groups(
        questions,
        task.verify,
        engine,
        credit_model.tokenizer,
        prompt=contexts.student,
        sampling=sampling,
        group_size=rollout.group_size,
        at_once=max(1, rollout.batch_rows // rollout.group_size),
        seed=config.seed,
    )
