"""The load-balancing loss of mixtures of experts, as part of the loss of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from hsd.config import ObjectiveConfig
from hsd.metrics import read_json_lines
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy import head
from hsd.policy.layers import checkpoint_activations
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy, make_policy

MakeRow = Callable[..., TrainingRow]

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "qwen3": lambda **changes: Qwen3MoeConfig(
        **SIZES,
        num_experts=4,
        moe_intermediate_size=24,
        head_dim=16,
        mlp_only_layers=[1],
        **changes,
    ),
    "mixtral": lambda **changes: MixtralConfig(**SIZES, num_local_experts=4, **changes),
}


def make(kind: str, objective: ObjectiveConfig, **changes: Any) -> Policy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**changes)).eval()
    return make_policy(model, objective, compute_dtype=torch.float32)


def gradients(
    policy: Policy, rows: list[TrainingRow], objective: ObjectiveConfig, budget: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    policy.model.zero_grad()
    sums, _ = accumulate_gradients(
        policy, rows, objective, micro_batch_tokens=budget, temperature=1.0
    )
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return found, dict(zip(SUMS, sums.tolist(), strict=True))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_it_is_the_models_own_loss_of_each_sequence_however_rows_are_split(
    kind: str, make_row: MakeRow
) -> None:
    with_it, without = ObjectiveConfig(router_aux_coef=0.5), ObjectiveConfig(router_aux_coef=0.0)
    policy = make(kind, with_it)
    plain = replace(policy, router_coef=0.0)
    # Two of one content, which are merged.
    rows = [make_row(seed, prompt=3 + seed, response=2 + seed) for seed in (0, 1, 2, 2)]
    base, base_sums = gradients(plain, rows, without, 16)

    # transformers' own, of the whole model, one sequence at a time.
    policy.model.zero_grad()
    expected_loss = 0.0
    for row in rows:
        ids = torch.tensor([[*row.student_prompt, *row.response]])
        loss = policy.model(input_ids=ids, output_router_logits=True).aux_loss * sum(row.weights)
        (0.5 * loss).backward()
        expected_loss += float(loss.detach())
    parts = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    routers = [name for name in parts if name.endswith("gate.weight")]
    assert routers and all(parts[name].norm() > 0 for name in routers)

    for budget in (1, 40, 1000):
        found, sums = gradients(policy, rows, with_it, budget)
        assert sums["router_aux"] == pytest.approx(expected_loss, rel=1e-5)
        assert sums["loss"] == pytest.approx(base_sums["loss"] + 0.5 * expected_loss, rel=1e-5)
        for name, gradient in found.items():
            expected = base[name] + parts.get(name, torch.zeros(()))
            assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-8, name


def test_padding_and_other_rows_of_a_batch_do_not_count(make_row: MakeRow) -> None:
    objective = ObjectiveConfig(router_aux_coef=1.0)
    policy = make("qwen3", objective)
    short, long = make_row(0, response=2), make_row(1, prompt=20, response=9)
    alone = gradients(policy, [short], objective, 1000)[1]["router_aux"]
    other = gradients(policy, [long], objective, 1000)[1]["router_aux"]
    both = gradients(policy, [short, long], objective, 1000)[1]["router_aux"]
    assert both == pytest.approx(alone + other, rel=1e-5)


def test_checkpointed_layers_give_the_same_gradient(make_row: MakeRow) -> None:
    objective = ObjectiveConfig(router_aux_coef=1.0)
    policy, rows = make("qwen3", objective), [make_row(0), make_row(1, prompt=9)]
    expected, _ = gradients(policy, rows, objective, 1000)
    checkpoint_activations(policy.model)
    found, _ = gradients(policy, rows, objective, 1000)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("own", "chosen", "expected"),
    [
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, None, 0.02),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.02}, None, 0.0),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, 0.0, 0.0),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.02}, 0.1, 0.1),
    ],
)
def test_the_coefficient_is_the_models_or_the_options(
    own: dict[str, Any], chosen: float | None, expected: float
) -> None:
    assert make("qwen3", ObjectiveConfig(router_aux_coef=chosen), **own).router_coef == expected


def test_a_coefficient_of_zero_computes_nothing(
    make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(head, "balance_losses", fail)
    objective = ObjectiveConfig()
    policy = make("qwen3", objective)
    calls: list[Any] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    assert gradients(policy, [make_row(0)], objective, 100)[1]["router_aux"] == 0
    assert calls and all("output_router_logits" not in kwargs for kwargs in calls)


def test_a_run_reports_it_and_leaves_a_model(
    tmp_path: Path, tokenizer: Any, make_recipe: Callable[..., Path], run_hsd: Callable[..., int]
) -> None:
    make("qwen3", ObjectiveConfig()).model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {
        "model": {"name": str(tmp_path / "model")},
        "objective": {"router_aux_coef": 0.01},
        "sharding": {"activation_checkpointing": True},
    }
    recipe, run = make_recipe(tmp_path, changes), tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run) == 0
    steps = [each for each in read_json_lines(run / "metrics.jsonl") if each["kind"] == "step"]
    assert all(1 < each["router_aux_loss"] < 4 for each in steps)  # 2 of 4 experts: 2 in balance
    _, info = AutoModelForCausalLM.from_pretrained(run / "checkpoint", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_dense_model_has_no_coefficient(make_model: Callable[..., Any]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"objective\.router_aux_coef: found 0\.1, expected 0"):
        make_policy(model, ObjectiveConfig(router_aux_coef=0.1), compute_dtype=torch.float32)
