"""`hsd budget`: what a step of a recipe needs, before it is run."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hsd.checks import require
from hsd.config import Config
from hsd.distributed.budget import kinds, report
from hsd.distributed.budget.architecture import load_architecture
from hsd.distributed.budget.estimate import (
    Assumptions,
    Rollouts,
    StepEstimate,
    assumed,
    estimate_step,
    rollouts,
)
from hsd.distributed.budget.search import GRANULE, longest_response
from hsd.distributed.budget.simulate import LossName, Scenario, Simulation, simulate
from hsd.recipe import fail, load_recipe, parse_flags

_CONTEXT_TEXT = 128  # tokens of the teacher's prompt around peer and answer
_MOST_RANKS = 1024  # the work grows with them, and a rank's share of the memory hardly falls
_UNITS = {"M": (10**6, 2**20), "G": (10**9, 2**30), "T": (10**12, 2**40)}


@dataclass(frozen=True, kw_only=True)
class BudgetArguments:
    """Simulate a step on fake tensors and say what it needs of each GPU; takes a minute or more.

    Args:
        recipe: path of a recipe; its model's architecture is shipped (Qwen3-8B and 32B), in its
            directory, or on the hub.
        world_size: GPUs, one rank each; at most 1024.
        gpu_memory: of one GPU, such as 80GB or 80G (10^9 bytes), 74GiB (2^30) or 81559MiB.
        response_tokens: of every rollout; default: the recipe's rollout.max_new_tokens.
        prompt_tokens: of a question.
        engine_gpus: GPUs that share the weights of one engine, by tensor parallelism; default: the
            recipe's engine.tensor_parallel. Engines sample on the trainer's GPUs and sleep during
            the update.
        compare: also with a plain loss over N x V, and with a loop over chunks of it.
        search: find the longest responses that fit; takes several simulations.
        figure: the PNG to write; default: budget-RECIPE.png.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    world_size: int = 8
    gpu_memory: str = "80GB"
    response_tokens: int | None = None
    prompt_tokens: int = 1024
    engine_gpus: int | None = None
    compare: bool = False
    search: bool = True
    figure: Path | None = None


def main(argv: list[str]) -> int:
    """`hsd budget RECIPE ...`: 0 where it fits, 1 where it does not, 2 for bad usage."""
    arguments = parse_flags(BudgetArguments, argv, prog="hsd budget")
    try:
        gpu_bytes = parse_bytes(arguments.gpu_memory)
        figure = arguments.figure or Path(f"budget-{arguments.recipe.stem}.png")
        writable = figure.parent.is_dir() and figure.suffix == ".png"
        require("--figure", str(figure), writable, "a .png in a folder that is there")
        scenario = scenario_of(load_recipe(arguments.recipe), arguments)
    except (ValueError, OSError) as error:
        fail(str(error))
    # Of torch, on fake tensors that it prints or copies.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    console = Console()
    try:
        simulation = _simulated(scenario)
    except ValueError as error:  # options that do not fit the model
        fail(str(error))
    try:
        _show(console, scenario, simulation, gpu_bytes, figure)
    except OSError as error:
        fail(f"--figure: {figure} could not be written ({error.strerror})")
    if arguments.compare:
        console.print(_comparison(scenario, simulation, gpu_bytes))
    if arguments.search:
        _show_longest(console, scenario, simulation, gpu_bytes)
    return 0 if assumed(scenario).needed(simulation.peak) <= gpu_bytes else 1


def parse_bytes(text: str) -> int:
    """Bytes of "80GB", "80 gb" or "80G" (80 * 10^9), "80GiB" or "80Gi" (80 * 2^30); also M and T.

    Raises:
        ValueError: another form, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])(I?)B?", text.strip(), re.ASCII | re.IGNORECASE)
    nbytes = int(float(found[1]) * _UNITS[found[2].upper()][bool(found[3])]) if found else 0
    if not nbytes:
        raise ValueError(f"--gpu-memory: found {text!r}, expected such as 80GB, 80GiB or 81559MiB")
    return nbytes


def _simulated(scenario: Scenario) -> Simulation:
    """With a line on stderr of what is simulated: it takes most of a minute."""
    console = Console(stderr=True)
    loss = "" if scenario.loss == "fused" else f", {scenario.loss.replace('_', ' ')} loss"
    what = (
        f"simulating a step: {scenario.response_tokens:,} response tokens on "
        f"{scenario.world_size} GPUs{loss}"
    )
    progress: AbstractContextManager[object] = nullcontext()
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        progress = shown = Progress(*columns, console=console, transient=True)
        shown.add_task(what, total=None)
    else:
        console.print(what, soft_wrap=True, highlight=False)
    with progress:
        return simulate(scenario)


def scenario_of(config: Config, arguments: BudgetArguments) -> Scenario:
    """What a recipe and the arguments ask to simulate.

    Raises:
        ValueError: an argument out of range, no such model, or what cannot be simulated.
    """
    response = arguments.response_tokens
    response = config.rollout.max_new_tokens if response is None else response
    engine_gpus = arguments.engine_gpus
    engine_gpus = config.engine.tensor_parallel if engine_gpus is None else engine_gpus
    numbers = {
        "world-size": arguments.world_size,
        "response-tokens": response,
        "prompt-tokens": arguments.prompt_tokens,
        "engine-gpus": engine_gpus,
    }
    for name, value in numbers.items():
        require(f"--{name}", value, value >= 1, ">= 1")
    size = arguments.world_size
    require("--world-size", size, size <= _MOST_RANKS, f"at most {_MOST_RANKS}")
    whole = size % engine_gpus == 0
    require("--engine-gpus", engine_gpus, whole, f"a divisor of --world-size, {size}")
    context, peers = config.context, config.peers
    peer_tokens = peers.count * context.peer_token_budget if context.show_peer else 0
    architecture = load_architecture(config.model.name)
    longest = architecture.max_position_embeddings - arguments.prompt_tokens
    expected = f"at most {longest}, the positions of {config.model.name} behind --prompt-tokens"
    require("--response-tokens", response, response <= longest, expected)
    return Scenario(
        config=config,
        architecture=architecture,
        world_size=size,
        prompt_tokens=arguments.prompt_tokens,
        context_tokens=_CONTEXT_TEXT + peer_tokens,
        response_tokens=response,
        engine_gpus=engine_gpus,
    )


def _show(
    console: Console, scenario: Scenario, simulation: Simulation, gpu_bytes: int, figure: Path
) -> None:
    assumptions = assumed(scenario)
    sampling = rollouts(scenario, simulation, gpu_bytes, assumptions)
    rows = _rows(simulation, sampling)
    title = (
        f"{scenario.config.model.name} on {scenario.world_size} GPUs, "
        f"{scenario.response_tokens:,} response tokens"
    )
    console.print(report.memory_table(rows, title=f"{title}: GB per GPU"))
    report.draw(rows, gpu_bytes, figure, title=title)
    console.print(f"figure: {figure}", soft_wrap=True)
    needed = assumptions.needed(simulation.peak)
    left = gpu_bytes - needed
    console.print(
        f"simulated peak {report.gigabytes(simulation.peak)} GB; with "
        f"{assumptions.fragmentation:.0%} for fragmentation and "
        f"{report.gigabytes(assumptions.context_bytes)} GB for CUDA, NCCL and a sleeping engine "
        f"{report.gigabytes(needed)} GB of {report.gigabytes(gpu_bytes)} GB: "
        + (
            f"[green]fits, {report.gigabytes(left)} GB are left"
            if left >= 0
            else f"[red]does not fit, {report.gigabytes(-left)} GB are missing"
        )
    )
    if sampling.at_a_time < 1:
        console.print(
            f"[red]no engine fits beside the trainer: {report.gigabytes(sampling.weights)} GB of "
            f"its weights on each GPU with --engine-gpus {scenario.engine_gpus}"
        )
    estimate = estimate_step(scenario, simulation, sampling, assumptions)
    console.print(_step_table(scenario, simulation, sampling, estimate))
    console.print(f"modelled with {assumptions.described()}", highlight=False)


def _rows(simulation: Simulation, sampling: Rollouts) -> report.Rows:
    awake = {report.ENGINE: sampling.weights, report.CACHE: sampling.cache}
    return {
        "rollouts": {**simulation.resident, **awake},
        **report.largest_of_each(simulation.phases),
        "new weights": {
            **simulation.resident,
            kinds.UNSHARDED: sampling.gathered,
            report.ENGINE: sampling.weights,
        },
    }


def _step_table(
    scenario: Scenario, simulation: Simulation, sampling: Rollouts, estimate: StepEstimate
) -> Table:
    table = Table(title="One step of one rank", show_header=False)
    ranks = min(scenario.world_size, Assumptions().gpus_per_node)
    host = sum(simulation.host.values())
    table.add_row("micro-batches", f"{estimate.micro_batches} of {scenario.sequences} sequence(s)")
    table.add_row(
        "host memory",
        f"{report.gigabytes(host)} GB, {ranks} ranks of a node "
        f"{report.gigabytes(ranks * host)} GB (simulated)",
    )
    for name, nbytes in sorted(estimate.traffic.items()):
        table.add_row(name.replace("_", "-"), f"{report.gigabytes(nbytes)} GB (simulated)")
    table.add_row("work", f"{estimate.flop / 1e15:.1f} PFLOP (simulated)")
    table.add_row("rollouts at a time", f"{sampling.at_a_time:.1f} of full length (calculated)")
    for name, seconds in estimate.seconds.items():
        if math.isfinite(seconds):
            table.add_row(name, f"{seconds:.0f} s (modelled)")
    return table


def _show_longest(
    console: Console, scenario: Scenario, simulation: Simulation, gpu_bytes: int
) -> None:
    most = (
        scenario.architecture.max_position_embeddings
        - scenario.prompt_tokens
        - scenario.context_tokens
    )
    if most < GRANULE:
        console.print(
            "longest responses that fit: not searched, the model lacks positions for more"
        )
        return

    def slack(tokens: int) -> int:
        known = tokens == scenario.response_tokens
        tried = dataclasses.replace(scenario, response_tokens=tokens)
        peak = simulation.peak if known else _simulated(tried).peak
        return gpu_bytes - assumed(scenario).needed(peak)

    found = longest_response(slack, start=scenario.response_tokens, most=most)
    limit = ", all that the model has positions for" if found + GRANULE > most else ""
    console.print(f"longest responses that fit: {found:,} tokens{limit}")


def _comparison(scenario: Scenario, fused: Simulation, gpu_bytes: int) -> Table:
    table = Table(title="The same step with other losses: GB per GPU")
    for name in ("loss", "loss workspace", "peak", "needed", "left"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    names: tuple[LossName, ...] = ("fused", "chunk_loop", "naive")
    for name in names:
        other = dataclasses.replace(scenario, loss=name)
        simulation = fused if name == scenario.loss else _simulated(other)
        needed = assumed(scenario).needed(simulation.peak)
        workspace = max(phase.by_kind()["loss workspace"] for phase in simulation.phases)
        numbers = (workspace, simulation.peak, needed, gpu_bytes - needed)
        table.add_row(name.replace("_", " "), *map(report.gigabytes, numbers))
    return table
