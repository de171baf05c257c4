"""`hsd budget`: the simulation against the same step run for real, and what it says of a recipe."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3Config

from hsd import train
from hsd.config import Config, ModelConfig
from hsd.distributed.budget import command, estimate, simulate
from hsd.distributed.budget.architecture import load_architecture
from hsd.distributed.budget.search import GRANULE, longest_response
from hsd.distributed.budget.simulate import Scenario
from hsd.distributed.config import ShardingConfig
from hsd.distributed.load import load_sharded
from hsd.distributed.process import World, leave_world, sharding_mesh
from hsd.objective.config import ObjectiveConfig
from hsd.policy.config import AdapterConfig
from hsd.policy.optimizer import adamw
from hsd.rollout.config import EngineConfig
from hsd.trainer import sharded_policy, whole_policy
from hsd_kernels import workspace
from hsd_kernels.rows import torch_logits

VOCAB, ROWS = 4000, 320
CHUNK_BYTES = 3 * 4 * VOCAB * 64


def architecture(**changes: Any) -> Qwen3Config:
    return Qwen3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def scenario(*, world_size: int = 1, rank: int = 0, **sharding: Any) -> Scenario:
    config = Config(
        adapter=AdapterConfig(rank=rank),
        micro_batch_tokens=1,
        objective=ObjectiveConfig(max_chunk_bytes=CHUNK_BYTES),
        sharding=ShardingConfig(**sharding),
    )
    return Scenario(
        config=replace(config, model=replace(config.model, compute_dtype="float32")),
        architecture=architecture(),
        world_size=world_size,
        prompt_tokens=40,
        context_tokens=60,
        response_tokens=ROWS,
        backend="cpu",
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch's own arrays, which a compiled loss has not, are out of the way."""
    monkeypatch.setattr(torch_logits, "PLAIN_BLOCK_ELEMENTS", VOCAB)


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    leave_world()


def measured_peak(given: Scenario, folder: Path) -> int:
    """Bytes that the second update of a real trainer has at most beyond what it starts with."""
    config = replace(given.config, model=replace(given.config.model, name=str(folder)))
    model = AutoModelForCausalLM.from_config(given.architecture, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    if config.sharding.mode == "full":
        load = partial(
            load_sharded, folder, config.sharding, sharding_mesh(), compute_dtype=torch.float32
        )
        policy = sharded_policy(config, load, torch.float32)
    else:
        policy = whole_policy(config, model, torch.float32)
    parts: Any = SimpleNamespace(
        config=config,
        policy=policy,
        optimizer=adamw(policy.model.parameters(), 1e-3),
        world=World(rank=0, size=1),
    )
    rows = [simulate._row(given, number) for number in range(simulate.MICRO_BATCHES)]
    judged: Any = [(None, [SimpleNamespace(row=row) for row in rows])]
    train.update(parts, judged, 0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train.update(parts, judged, 0)
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate(event.nbytes() for event in memory))


def simulated_peak(given: Scenario) -> int:
    found = simulate.simulate(given)
    return found.peak - sum(found.resident.values())


SHARDINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, checkpointed": {"activation_checkpointing": True},
    "sharded": {"mode": "full"},
    "sharded, checkpointed": {"mode": "full", "activation_checkpointing": True},
    "whole, adapters": {"rank": 8},
    "sharded, adapters": {"rank": 8, "mode": "full"},
}


@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
def test_the_simulated_peak_is_the_measured_one(
    sharding: dict[str, Any], tmp_path: Path, alone: None
) -> None:
    given = scenario(**sharding)
    simulated = simulated_peak(given)
    assert simulated == pytest.approx(measured_peak(given, tmp_path), rel=0.1)


def test_a_deliberate_n_x_v_buffer_is_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scenario()
    buffer = 8 * ROWS * VOCAB * 4
    assert simulated_peak(given) < buffer
    heads = workspace._heads

    def wasteful(problem: Any, *rest: Any) -> Any:
        problem.student.new_empty((8 * ROWS, VOCAB))
        return heads(problem, *rest)

    monkeypatch.setattr(workspace, "_heads", wasteful)
    simulated, measured = simulated_peak(given), measured_peak(given, tmp_path)
    assert min(simulated, measured) > buffer
    assert simulated == pytest.approx(measured, rel=0.1)


def test_each_rank_has_its_share() -> None:
    given = scenario(world_size=4, mode="full", offload="optimizer", offload_reference=True)
    found = simulate.simulate(given)
    share = 4 * given.parameters / 4
    assert found.resident["parameters"] == pytest.approx(share, rel=0.02)
    assert found.host["optimiser state"] == pytest.approx(2 * share, rel=0.02)
    assert found.host["reference, teacher"] == pytest.approx(share, rel=0.02)
    assert found.resident["optimiser state"] == found.resident["reference, teacher"] == 0
    for phase in found.phases:
        assert sum(phase.by_kind().values()) == phase.peak


def test_the_head_is_gathered_once_an_update_and_its_gradient_is_summed_once() -> None:
    """Layers are gathered for teacher, reference, student and backward of each micro-batch, the
    embedding for all but backward; the head before them all, beside what is counted here."""
    given = scenario(world_size=4, mode="full")
    found = simulate.simulate(given)
    head = embedding = 4 * VOCAB * 64
    layers = 4 * given.parameters - head - embedding
    gathered = sum(phase.traffic["allgather"] for phase in found.phases)
    assert gathered == pytest.approx(2 * (4 * layers + 3 * embedding), rel=1e-3)
    first, last = (p.traffic["reduce_scatter"] for p in found.phases if p.name == "backward")
    assert (first, last) == (layers + embedding, layers + embedding + head)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_of_adapters_alone_gradients_and_states_are_kept(mode: str) -> None:
    rank = 8
    given = scenario(world_size=1, rank=rank, mode=mode)
    found = simulate.simulate(given)
    ends = 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64) + 2 * 3 * (64 + 160)  # in + out of each
    factors = 4 * rank * ends
    assert found.resident["parameters"] == pytest.approx(4 * given.parameters + factors, rel=0.01)
    assert found.resident["optimiser state"] == pytest.approx(2 * factors, rel=0.01)
    assert found.resident["reference, teacher"] == 0  # the same weights without the adapter
    gradients = max(phase.by_kind()["gradients"] for phase in found.phases)
    assert gradients == pytest.approx(factors, rel=0.01)


@pytest.mark.parametrize(
    ("rank", "changes", "beside"),
    [
        (0, {"teacher": "live"}, ["teacher", "reference"]),
        (0, {"teacher": "initial"}, ["teacher", "reference"]),  # one frozen model
        (8, {"teacher": "live"}, ["teacher", "reference"]),  # one model for all
        (8, {"teacher": "initial"}, ["teacher", "reference"]),
        (8, {"teacher": "live", "measure_reference": False, "ref_coef": 0.0}, ["teacher"]),
        (
            0,
            {"teacher": "none", "token_loss": "token_ratio", "advantage": "centred"},
            ["reference"],
        ),
    ],
)
def test_teacher_and_reference_have_a_row_each(
    rank: int, changes: dict[str, Any], beside: list[str]
) -> None:
    given = scenario(rank=rank)
    objective = replace(given.config.objective, **{"ref_coef": 0.1, **changes})
    given = replace(given, config=replace(given.config, objective=objective))
    phases = simulate.simulate(given).phases
    names = [phase.name.removesuffix(" forward") for phase in phases]
    assert names == [*beside, "student", "loss", "backward"] * 2 + ["optimiser"]
    # The teacher's prompts are the longer ones, by 60 tokens; the reference runs without adapters.
    flop = {name: phase.flop for name, phase in zip(names, phases, strict=True)}
    if len(beside) == 2:
        assert flop["teacher"] > 1.1 * flop["reference"]
        assert (flop["reference"] == flop["student"]) == (rank == 0)


def test_the_engine_of_the_recipe_is_counted() -> None:
    """Its weights are divided among its GPUs, and it keeps more on each of several."""
    whole, part = scenario(world_size=4), replace(scenario(world_size=4), engine_gpus=4)
    nothing = simulate.Simulation(phases=[], resident={"parameters": 10**9}, host={})
    alone, shared = (
        estimate.rollouts(given, nothing, 8 * 10**9, estimate.assumed(given))
        for given in (whole, part)
    )
    assert alone.weights == 2 * whole.parameters == 4 * shared.weights
    kept = 10**9  # what a rank of a tensor-parallel engine has beside weights and cache
    assert shared.cache - alone.cache == alone.weights - shared.weights - kept


@pytest.mark.parametrize(("flag", "expected"), [(None, 2), (1, 1)])
def test_the_engine_s_gpus_are_those_of_the_recipe(flag: int | None, expected: int) -> None:
    engine = EngineConfig(kind="vllm", shared=True, sleep=True, tensor_parallel=2)
    config = replace(scenario().config, engine=engine, model=ModelConfig(name="Qwen/Qwen3-8B"))
    words = command.BudgetArguments(recipe=Path("r.toml"), world_size=4, engine_gpus=flag)
    assert command.scenario_of(config, words).engine_gpus == expected
    with pytest.raises(ValueError, match="--engine-gpus: found 2, expected a divisor of --world"):
        command.scenario_of(config, replace(words, world_size=3, engine_gpus=2))


def test_the_naive_loss_holds_n_x_v() -> None:
    given = scenario()
    fused, naive, loop = (
        simulated_peak(replace(given, loss=name)) for name in ("fused", "naive", "chunk_loop")
    )
    matrix = 4 * ROWS * VOCAB
    assert naive > fused + 3 * matrix
    assert loop > fused


def test_products_are_counted() -> None:
    given = scenario()
    flop = {phase.name: phase.flop for phase in simulate.simulate(given).phases}
    tokens, size = 40 + ROWS, 64
    linear = 2 * (size * 64 * 2 + size * 32 * 2 + 3 * size * 160)
    attention = 2 * 2 * 2 * tokens * tokens * 64 / 2
    assert flop["student forward"] == pytest.approx(2 * tokens * linear + attention, rel=0.01)
    assert flop["loss"] == 5 * 2 * ROWS * size * VOCAB


@pytest.mark.parametrize("longest", [0, 1, 7, 63, 64])
def test_the_search_finds_the_longest(longest: int) -> None:
    calls = []

    def slack(tokens: int) -> int:
        calls.append(tokens)
        return int((longest + 0.5) * GRANULE * 1000) - tokens * 1000

    assert longest_response(slack, start=16 * GRANULE, most=64 * GRANULE + 5) == longest * GRANULE
    assert len(calls) <= 8


def test_qwen3_is_known_without_a_hub() -> None:
    sizes = {}
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"):
        given = replace(scenario(), architecture=load_architecture(name))
        sizes[name] = given.parameters
    assert sizes == {"Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-32B": 32_762_123_264}
    with pytest.raises(ValueError, match=r"model\.name: found 'nobody/nothing', expected a model"):
        load_architecture("nobody/nothing")


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    Qwen3Config(num_hidden_layers=0, layer_types=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: found .*, a model of no layers"):
        load_architecture(str(tmp_path))
