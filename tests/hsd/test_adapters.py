"""Adapters: their gradient, the one model behind policy, teacher and reference, what leaves it."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from hsd.config import Config, ModelConfig, ObjectiveConfig
from hsd.distributed.fsdp import whole_weights
from hsd.distributed.process import World
from hsd.metrics import read_json_lines
from hsd.objective import step
from hsd.objective.step import accumulate_gradients
from hsd.policy.adapters import (
    OFF,
    POLICY,
    REFERENCE,
    TEACHER,
    Adapters,
    add_adapters,
    computing_with,
    merged,
)
from hsd.policy.config import AdapterConfig
from hsd.policy.optimizer import adamw, clipped_step
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy, after_update
from hsd.rollout.hf import HfEngine
from hsd.rollout.weight_sync import WeightFiles, whole_tensors
from hsd.trainer import whole_policy

MakeModel = Callable[..., Any]
MakeRow = Callable[..., TrainingRow]
MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]

IDS = torch.arange(12)[None]
RANK = 3
ADAPTER = AdapterConfig(rank=RANK, alpha=6.0)


def config(**objective: Any) -> Config:
    return Config(
        model=ModelConfig(compute_dtype="float32"),
        adapter=ADAPTER,
        objective=ObjectiveConfig(**{"ref_coef": 0.3, **objective}),
    )


def adapters(**changes: Any) -> Adapters:
    return Adapters(config=AdapterConfig(**changes), seed=0)


def adapted(model: Any, **objective: Any) -> Policy:
    """A policy whose adapter has moved: its factors B are not zero."""
    policy = whole_policy(config(**objective), model, torch.float32)
    shake(policy.model)
    return policy


@torch.no_grad()
def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if f".{POLICY}." in name:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def written_out(plain: Any, model: Any, adapter: str) -> Any:
    """The plain model with W + alpha / rank B A in the place of each adapted weight."""
    own, factors = copy.deepcopy(plain), dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in own.named_parameters():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.{adapter}.weight" in factors:
                a, b = (factors[f"{stem}.lora_{one}.{adapter}.weight"] for one in "AB")
                weight += ADAPTER.alpha / RANK * (b @ a)
    return own


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "phi-bias"])
@pytest.mark.parametrize("teacher", ["live", "initial"])
def test_gradients_are_those_of_the_dense_loss_and_the_base_has_none(
    kind: str, teacher: str, make_model: MakeModel, make_row: MakeRow
) -> None:
    plain = make_model(kind)
    policy = adapted(copy.deepcopy(plain), teacher=teacher)
    rows = [make_row(seed, prompt=4 + seed, response=3 + seed) for seed in range(3)]

    student, initial = copy.deepcopy(policy.model).double(), copy.deepcopy(plain).double()
    judge = student if teacher == "live" else initial
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:

        def log_probs(model: Any, prompt: Any, row: Any = row) -> Tensor:
            ids = torch.tensor([[*prompt, *row.response]])
            found: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            return found

        log_p = log_probs(student, row.student_prompt)
        with torch.no_grad():
            log_q = log_probs(judge, row.teacher_prompt)
            log_r = log_probs(initial, row.student_prompt)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        kl = kl + 0.3 * (log_p.exp() * (log_p - log_r)).sum(-1)
        loss = loss + (torch.tensor(row.weights, dtype=torch.float64) * kl).sum()
    loss.backward()
    expected = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    before = {name: value.clone() for name, value in policy.model.named_parameters()}
    objective = config(teacher=teacher).objective
    accumulate_gradients(policy, rows, objective, micro_batch_tokens=24, temperature=1.0)
    found = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(f".{POLICY}." in name for name in found)
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 2e-4, name

    parameters = list(policy.model.parameters())
    clipped_step(adamw(parameters, 1e-2), parameters, learning_rate=1e-2, max_grad_norm=1.0)
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(found)


def test_the_frozen_head_saves_a_matrix_product(
    make_model: MakeModel, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, plans = step.fused_hsd_loss, []

    def recording(*args: Any, **arguments: Any) -> Any:
        out = original(*args, **arguments)
        plans.append(out.plan)
        return out

    monkeypatch.setattr(step, "fused_hsd_loss", recording)
    for adapter in (AdapterConfig(), ADAPTER):
        policy = whole_policy(replace(config(), adapter=adapter), make_model(), torch.float32)
        accumulate_gradients(
            policy, [make_row(0)], config().objective, micro_batch_tokens=64, temperature=1.0
        )
    full, frozen = (plan.gemms for plan in plans)
    assert frozen == full - 1


@pytest.mark.parametrize(
    "objective",
    [
        {"teacher": "initial"},
        {"teacher": "ema"},
        {"teacher": "initial", "ref_refresh_every": 1},
    ],
)
def test_teacher_and_reference_are_no_second_model(
    objective: dict[str, Any], make_model: MakeModel
) -> None:
    model = make_model()
    base = sum(each.nbytes for each in model.parameters())
    before = _alive()
    policy = whole_policy(config(**objective), model, torch.float32)
    factors = sum(p.nbytes for n, p in model.named_parameters() if ".lora_" in n)
    assert policy.teacher is policy.initial is policy.model
    fresh = _alive()
    assert sum(fresh[each] for each in fresh.keys() - before.keys()) <= factors + base / 20


def _alive() -> dict[int, int]:
    """Bytes of each tensor that there is, by its address."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter):
            # Other tests' compiled graphs hold some without an address.
            with contextlib.suppress(RuntimeError):
                found[each.data_ptr()] = each.nbytes
    return found


def test_averages_of_the_adapter_and_the_switch(make_model: MakeModel) -> None:
    plain = make_model()
    policy = whole_policy(
        config(teacher="ema", teacher_decay=0.75, ref_refresh_every=2, ref_refresh_decay=0.25),
        copy.deepcopy(plain),
        torch.float32,
    )
    model, objective = (
        policy.model,
        config(
            teacher="ema", teacher_decay=0.75, ref_refresh_every=2, ref_refresh_decay=0.25
        ).objective,
    )
    for updates in (1, 2):
        shake(model)
        after_update(policy, objective, updates=updates)
    factors = dict(model.named_parameters())
    name = "model.layers.0.mlp.up_proj.lora_B.{}.weight".format
    now = factors[name(POLICY)]  # twice a step of now / 2
    torch.testing.assert_close(factors[name(TEACHER)], 0.75 * 0.25 * now / 2 + 0.25 * now)
    torch.testing.assert_close(factors[name(REFERENCE)], 0.75 * now)

    expected = written_out(plain, model, POLICY)
    for adapter in (policy.teacher_adapter, policy.initial_adapter):
        with computing_with(model, adapter):
            found = logits(model)
        torch.testing.assert_close(found, logits(written_out(plain, model, adapter)))
        assert not torch.allclose(found, logits(expected), atol=1e-3)
    with computing_with(model, OFF):
        assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in factors if f".{POLICY}." in n}


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2-positions"])
def test_what_leaves_is_the_merged_model(
    kind: str, make_model: MakeModel, tokenizer: Any, tmp_path: Path
) -> None:
    plain = make_model(kind)
    policy = adapted(copy.deepcopy(plain), teacher="ema")
    model = policy.model
    state = dict(whole_tensors(model, torch.float32, keep_head=True))
    assert state.keys() == plain.state_dict().keys()
    files = WeightFiles(
        tokenizer, dtype=torch.float32, parent=tmp_path, world=World(rank=0, size=1)
    )
    written = load_file(files.write(model, 1) / "model.safetensors")
    assert written and all(torch.equal(each, state[name]) for name, each in written.items())
    read = copy.deepcopy(plain)
    read.load_state_dict(state)
    torch.testing.assert_close(logits(read), logits(model), atol=1e-4, rtol=1e-4)

    engine = HfEngine(model, tokenizer, compute_dtype=torch.float32, batch_rows=4)
    engine.update_weights(model, version=1)
    held = dict(engine._model.named_parameters())
    assert held.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(held[n], w) for n, w in merged(model, model.named_parameters()))


def test_a_run_trains_the_adapter_and_leaves_a_model_to_evaluate(
    tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd
) -> None:
    changes = {
        "adapter": {"rank": 2},
        "objective": {"teacher": "initial"},
        "sharding": {"activation_checkpointing": True},
    }
    recipe, run = make_recipe(tmp_path, changes), tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run) == 0
    _, info = AutoModelForCausalLM.from_pretrained(run / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    steps = [each for each in read_json_lines(run / "metrics.jsonl") if each["kind"] == "step"]
    # The engine has the merged weights of each step, and the reference stays behind.
    assert all(each["engine_gap_max"] < 1e-3 for each in steps)
    assert steps[0]["ref_kl"] < 1e-6 < steps[-1]["ref_kl"]
    assert run_hsd("eval", run, "--samples", 1) == 0


def test_what_cannot_be_adapted_is_named(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for modules in (("lm_head",), ("nowhere",), ("norm",)):
        with pytest.raises(ValueError, match=r"adapter\.target_modules: found"):
            add_adapters(make_model(), adapters(rank=1, target_modules=modules))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"adapter\.rank: found peft not installed"):
        add_adapters(make_model(), adapters(rank=1))
    with pytest.raises(ValueError, match=r"adapter\.alpha: found 8.0, expected adapter\.rank"):
        AdapterConfig(alpha=8.0)


def test_of_a_mixture_of_experts_attention_is_adapted(tmp_path: Path) -> None:
    def make() -> Any:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
        shape = Qwen3MoeConfig(vocab_size=260, **sizes, **heads, **experts)
        return AutoModelForCausalLM.from_config(shape).eval()

    policy = adapted(make())
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all(".self_attn." in name for name in trained)
    policy.model.save_pretrained(tmp_path, state_dict=whole_weights(policy.model, keep=True))
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(read), logits(policy.model), atol=1e-4, rtol=1e-4)
    for modules in (("gate_proj",), ("experts",), ("gate",)):
        with pytest.raises(ValueError, match=r"adapter\.target_modules: found"):
            add_adapters(make(), adapters(rank=1, target_modules=modules))


def test_target_modules_are_ends_of_names(make_model: MakeModel) -> None:
    model = make_model()
    add_adapters(model, adapters(rank=1, target_modules=("q_proj",)))
    factors = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * 2  # two layers, A and B
    assert all(".q_proj." in name for name in factors)


def test_factors_depend_on_seed_and_layer_alone(make_model: MakeModel) -> None:
    def factors(seed: int, **changes: Any) -> dict[str, Tensor]:
        model = make_model()
        names = (POLICY, TEACHER)
        chosen = Adapters(config=AdapterConfig(rank=2, **changes), seed=seed, names=names)
        add_adapters(model, chosen)
        return {n: p for n, p in model.named_parameters() if ".lora_" in n}

    first, fewer, other = factors(0), factors(0, target_modules=("up_proj",)), factors(1)
    assert fewer.keys() < first.keys()
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    for name, factor in first.items():
        if ".lora_B." in name:
            assert not factor.any()
            continue
        assert torch.equal(factor, first[name.replace(POLICY, TEACHER)])
        assert not torch.equal(factor, other[name])
        bound = factor.shape[1] ** -0.5
        assert 0.8 * bound < factor.abs().max() <= bound and abs(factor.mean()) < 0.3 * bound
    distinct = [f for n, f in first.items() if f".lora_A.{POLICY}" in n and f.shape[1] == 32]
    assert not any(torch.equal(distinct[0], each) for each in distinct[1:])
