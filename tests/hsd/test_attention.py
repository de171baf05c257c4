"""Packed micro-batches are padded ones without the padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hsd.config import ObjectiveConfig
from hsd.objective.step import accumulate_gradients
from hsd.policy import attention
from hsd.policy.attention import with_packing
from hsd.policy.head import response_hidden
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy, make_policy

MakeModel = Callable[..., PreTrainedModel]
MakePolicy = Callable[..., Policy]
MakeRow = Callable[..., TrainingRow]

PACKABLE = ("llama", "llama-tied", "gemma2-softcap", "cohere-scale", "gpt2-positions")
UNEVEN = [(5, 9, 4), (2, 12, 7), (8, 3, 1), (1, 0, 6), (3, 40, 30)]  # prompt, context, response


@pytest.fixture
def rows(make_row: MakeRow) -> list[TrainingRow]:
    return [
        make_row(seed, prompt=prompt, context=context, response=response)
        for seed, (prompt, context, response) in enumerate(UNEVEN)
    ]


def gradient(
    policy: Policy, rows: list[TrainingRow], *, micro_batch_tokens: int = 10_000
) -> tuple[Tensor, Tensor]:
    """The gradient of all parameters, flat, and what was summed up beside it."""
    policy.model.zero_grad(set_to_none=True)
    objective = ObjectiveConfig(ref_coef=0.3)
    sums, _ = accumulate_gradients(
        policy, rows, objective, micro_batch_tokens=micro_batch_tokens, temperature=1.0
    )
    found = [each.grad for each in policy.model.parameters() if each.grad is not None]
    return torch.cat([each.flatten() for each in found]), sums


def assert_equal(policy: Policy, rows: list[TrainingRow], **options: int) -> None:
    """Packed as `policy` is, the step is the padded one to rounding."""
    expected, expected_sums = gradient(replace(policy, packed=False), rows)
    found, sums = gradient(policy, rows, **options)
    assert policy.packed
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher", ["live", "initial"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_the_step_is_that_of_padded_rows(
    kind: str, teacher: str, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    assert_equal(with_packing(make_policy(kind, teacher=teacher), "packed"), rows)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 60])
def test_the_step_is_the_same_for_any_budget(
    micro_batch_tokens: int, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy = with_packing(make_policy(), "packed")
    assert_equal(policy, rows, micro_batch_tokens=micro_batch_tokens)


def test_one_sequence_is_a_row_of_its_own(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    assert_equal(with_packing(make_policy(), "packed"), rows[:1])


def test_a_packed_row_holds_no_padding(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    policy = with_packing(make_policy(), "packed")
    shapes: list[tuple[int, ...]] = []
    hooks = [
        model.base_model.register_forward_pre_hook(
            lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)),
            with_kwargs=True,
        )
        for model in (policy.model, policy.initial)
    ]
    gradient(policy, rows)
    for hook in hooks:
        hook.remove()
    student = sum(prompt + response for prompt, _, response in UNEVEN)
    context = sum(context for _, context, _ in UNEVEN)
    assert sorted(shapes) == [(1, student), (1, student), (1, student + context)]


def test_auto_pads_where_there_is_no_varlen_kernel(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert with_packing(policy, "auto") is policy
    assert with_packing(policy, "padded") is policy


def bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["opt-positions", "bloom"])
def test_a_model_that_ignores_positions_is_refused(
    kind: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bloom() if kind == "bloom" else make_model(kind)
    policy = make_policy(model, ObjectiveConfig(), compute_dtype=torch.float32)
    reason = "takes no positions" if kind == "bloom" else r"differ by \d+\.\d% between packed"
    with pytest.raises(ValueError, match=rf"packing: found 'packed', expected .*{reason}"):
        with_packing(policy, "packed")
    monkeypatch.setattr(attention, "_runs_varlen", lambda policy: True)
    monkeypatch.setattr(attention, "_VARLEN", "sdpa")
    assert not with_packing(policy, "auto").packed


def varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What a varlen kernel does with the arguments that it takes; q, k, v are (1, H, T, D)."""
    bounds = options.pop("cu_seq_lens_q", torch.tensor([0, query.shape[2]])).tolist()
    options.pop("position_ids", None)
    parts = [
        sdpa_attention_forward(
            module,
            *(each[:, :, start:end] for each in (query, key, value)),
            None,
            **{**options, "is_causal": True},
        )[0]
        for start, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=1), None


def test_varlen_kernels_are_told_of_the_sequences(
    make_model: MakeModel, rows: list[TrainingRow]
) -> None:
    prompts, responses = [row.teacher_prompt for row in rows], [row.response for row in rows]
    expected = response_hidden(make_model(), prompts, responses, compute_dtype=torch.float32)
    model = make_model()
    AttentionInterface.register("varlen_of_a_test", varlen)
    model.set_attn_implementation("varlen_of_a_test")
    found = response_hidden(model, prompts, responses, compute_dtype=torch.float32, packed=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_all_models_run_varlen_kernels_where_they_are_there(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_runs_varlen", lambda policy: True)
    monkeypatch.setattr(attention, "_VARLEN", "eager")  # not what the models come with
    objective = ObjectiveConfig(teacher="ema")
    policy = make_policy(make_model(), objective, compute_dtype=torch.float32)
    assert with_packing(policy, "auto").packed
    for model in (policy.model, policy.teacher, policy.initial):
        assert model is not None
        assert model.config._attn_implementation == "eager"
