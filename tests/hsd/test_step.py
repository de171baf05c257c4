"""The gradient of a step against the loss of METHOD.md, written out: dense, float64, row by row."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hsd.config import ObjectiveConfig
from hsd.objective import micro_batch, step
from hsd.objective.step import SUMS, accumulate_gradients
from hsd.policy.head import response_hidden
from hsd.policy.packing import TrainingRow, micro_batches, without_idle_ends
from hsd.policy.teachers import Policy

MakePolicy = Callable[..., Policy]
MakeRow = Callable[..., TrainingRow]

ARCHITECTURES = (
    "llama",
    "llama-tied",
    "gemma2-softcap",
    "cohere-scale",
    "granite-scale",
    "phi-bias",
    "gpt2-positions",
    "opt-positions",
)
REF_COEF = 0.3  # large enough for its share of the gradient to be seen


def log_probs(
    model: Any, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> Tensor:
    """(response, V) log-probabilities of the model's own logits."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def divergence(objective: ObjectiveConfig, log_q: Tensor, log_p: Tensor) -> Tensor:
    """(T,) of the teacher's q and the student's p."""
    if objective.divergence == "forward_kl":
        return kl(log_q, log_p)
    if objective.divergence == "reverse_kl":
        return kl(log_p, log_q)
    b = objective.jsd_beta
    log_m = (b * log_q.exp() + (1 - b) * log_p.exp()).log()
    return b * kl(log_q, log_m) + (1 - b) * kl(log_p, log_m)


def dense(
    policy: Policy,
    rows: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of all parameters, flat, and what `accumulate_gradients` sums up, by name."""
    student, teacher, initial = (
        copy.deepcopy(model).double() for model in (policy.model, policy.teacher, policy.initial)
    )
    total = dict.fromkeys(("loss", "kl", "ref_kl", "entropy", "weight", "tokens", "gap"), 0.0)
    loss = torch.zeros((), dtype=torch.float64)
    for row in rows:
        weights = torch.tensor(row.weights, dtype=torch.float64)
        log_p = log_probs(student, row.student_prompt, row.response, temperature)
        with torch.no_grad():
            log_q = log_probs(teacher, row.teacher_prompt, row.response, temperature)
            log_r = log_probs(initial, row.student_prompt, row.response, temperature)
        to_teacher, to_initial = divergence(objective, log_q, log_p), kl(log_p, log_r)
        loss = loss + (weights * (to_teacher + objective.ref_coef * to_initial)).sum()
        own = log_p.gather(-1, torch.tensor(row.response)[:, None])[:, 0]
        total["kl"] += float((weights * to_teacher).detach().sum())
        total["ref_kl"] += float((weights * to_initial).detach().sum())
        total["entropy"] += float((weights * -(log_p.exp() * log_p).sum(-1)).detach().sum())
        total["weight"] += float(weights.sum())
        total["tokens"] += int((weights != 0).sum())
        gaps = (own.detach() - torch.tensor(row.logprobs)).abs()
        total["gap"] += float(gaps[weights != 0].sum())
    total["loss"] = float(loss.detach())
    gradient = torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True)
    return torch.cat([each.flatten() for each in gradient]), total


def accumulated(
    policy: Policy,
    rows: Sequence[TrainingRow],
    objective: ObjectiveConfig,
    *,
    micro_batch_tokens: int = 10_000,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The same two of `accumulate_gradients`."""
    policy.model.zero_grad(set_to_none=True)
    sums, _ = accumulate_gradients(
        policy,
        rows,
        objective,
        micro_batch_tokens=micro_batch_tokens,
        temperature=temperature,
    )
    gradient = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in policy.model.parameters()
    ]
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    return torch.cat([each.flatten() for each in gradient]), total


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def rows(make_row: MakeRow) -> list[TrainingRow]:
    """Rows of different lengths, with tokens of weight zero inside and at the end."""
    return [
        make_row(0),
        make_row(1, prompt=2, context=12, response=7),
        make_row(2, prompt=8, context=3, response=1),
        make_row(3, response=6, weights=(0.2, 0.0, 0.0, 0.5, 0.0, 0.0)),
    ]


@pytest.mark.gradient
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradient_of_each_architecture(
    kind: str, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, objective = make_policy(kind), ObjectiveConfig(ref_coef=REF_COEF)
    expected, _ = dense(policy, rows, objective)
    found, _ = accumulated(policy, rows, objective)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.gradient
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "jsd_beta": 0.2},
        {"ref_coef": 0.0},
        {"max_chunk_bytes": 20_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("teacher", ["live", "initial"])
def test_gradient_of_each_objective(
    teacher: str, options: dict[str, Any], make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy = make_policy(teacher=teacher)
    objective = ObjectiveConfig(**{"ref_coef": REF_COEF, **options})
    expected, _ = dense(policy, rows, objective)
    found, _ = accumulated(policy, rows, objective)
    assert relative_error(found, expected) <= 1e-4


def test_the_live_and_the_initial_teacher_differ(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    live, initial = (
        accumulated(make_policy(teacher=teacher), rows, ObjectiveConfig())[1]["kl"]
        for teacher in ("live", "initial")
    )
    assert abs(live - initial) > 0.01 * live


@pytest.mark.gradient
@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 45, 10_000])
def test_gradient_is_the_same_for_any_micro_batch(
    micro_batch_tokens: int, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, objective = make_policy(), ObjectiveConfig(ref_coef=REF_COEF)
    expected, _ = dense(policy, rows, objective)
    found, _ = accumulated(policy, rows, objective, micro_batch_tokens=micro_batch_tokens)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.gradient
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "one by one"])
def test_gradient_is_the_same_with_duplicates_merged_or_not(
    merge: bool,
    make_policy: MakePolicy,
    rows: list[TrainingRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not merge:
        monkeypatch.setattr(step, "merge_equal", list)
    repeated = [*rows, rows[0], rows[1], replace(rows[1], weights=(0.3,) * 7), rows[0]]
    policy, objective = make_policy(), ObjectiveConfig(ref_coef=REF_COEF)
    expected, _ = dense(policy, repeated, objective)
    found, _ = accumulated(policy, repeated, objective)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.gradient
@pytest.mark.parametrize("temperature", [0.6, 1.5])
@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap"])
def test_the_policy_that_is_trained_is_the_one_that_is_sampled(
    kind: str, temperature: float, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, objective = make_policy(kind), ObjectiveConfig(ref_coef=REF_COEF)
    expected, total = dense(policy, rows, objective, temperature=temperature)
    found, sums = accumulated(policy, rows, objective, temperature=temperature)
    assert relative_error(found, expected) <= 1e-4
    assert sums["kl"] == pytest.approx(total["kl"], rel=1e-4)


@pytest.mark.gradient
def test_scalars_follow_their_schedules(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    schedule = ObjectiveConfig(kl_coef=((0, 1.0), (8, 0.0)), ref_coef=((0, 0.0), (4, 2 * REF_COEF)))
    policy = make_policy()
    full, _ = dense(policy, rows, ObjectiveConfig(ref_coef=2 * REF_COEF))
    policy.model.zero_grad(set_to_none=True)
    accumulate_gradients(policy, rows, schedule, micro_batch_tokens=10_000, temperature=1.0, step=2)
    found = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    # At step 2: 3/4 of the divergence and half of the reference's 2 REF_COEF.
    only_kl, _ = dense(policy, rows, ObjectiveConfig(ref_coef=0.0))
    expected = 0.75 * only_kl + 0.5 * (full - only_kl)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_a_sparse_backward_is_near_the_gradient_and_says_what_it_dropped(
    micro_batch_tokens: int, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy = make_policy()
    with torch.no_grad():  # sharp distributions, whose gradient has its mass in few columns
        for model in (policy.model, policy.teacher, policy.initial):
            model.lm_head.weight.mul_(4)
    expected, _ = dense(policy, rows, ObjectiveConfig(ref_coef=0.0))
    found, sums = accumulated(
        policy,
        rows,
        ObjectiveConfig(ref_coef=0.0, sparse_tolerance=0.02),
        micro_batch_tokens=micro_batch_tokens,
    )
    assert 1e-3 < relative_error(found, expected) < 0.05
    assert 0 < sums["dropped_mass"] <= 0.02 * sums["gradient_mass"]
    assert 0 < sums["kept_share"] < 0.5 * sums["tokens"]
    mass = 0.0
    for row in rows:
        with torch.no_grad():
            log_p = log_probs(policy.model, row.student_prompt, row.response, 1.0)
            log_q = log_probs(policy.teacher, row.teacher_prompt, row.response, 1.0)
        mass += float(((log_p.exp() - log_q.exp()).abs().sum(-1) * torch.tensor(row.weights)).sum())
    assert sums["gradient_mass"] == pytest.approx(mass, rel=1e-3)


@pytest.mark.gradient
def test_gradients_add_up_over_calls(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    policy, objective = make_policy(), ObjectiveConfig(ref_coef=REF_COEF)
    expected, _ = dense(policy, rows, objective)
    policy.model.zero_grad(set_to_none=True)
    for part in (rows[:1], rows[1:]):
        accumulate_gradients(policy, part, objective, micro_batch_tokens=64, temperature=1.0)
    found = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.gradient
def test_a_row_whose_teacher_sees_no_context_adds_nothing_to_the_gradient(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, objective = make_policy(), ObjectiveConfig(ref_coef=0.0)
    empty = replace(rows[0], teacher_prompt=rows[0].student_prompt)
    expected, _ = dense(policy, rows[1:], objective)
    found, _ = accumulated(policy, [empty, *rows[1:]], objective)
    assert relative_error(found, expected) <= 1e-4


@pytest.mark.gradient
def test_bfloat16_is_the_precision_of_activations_and_not_of_the_loss(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy = make_policy(compute_dtype=torch.bfloat16)
    (batch,) = micro_batches(without_idle_ends(rows), token_budget=10_000)

    def log_probs_of(model: Any, side: str) -> Tensor:
        prompts, responses = [getattr(row, side) for row in batch], [row.response for row in batch]
        hidden = response_hidden(model, prompts, responses, compute_dtype=torch.bfloat16)
        return (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)

    log_p = log_probs_of(policy.model, "student_prompt")
    with torch.no_grad():
        log_q = log_probs_of(policy.model, "teacher_prompt")
        log_r = log_probs_of(policy.initial, "student_prompt")
    weights = torch.tensor([weight for row in batch for weight in row.weights])
    loss = (weights * (kl(log_q, log_p) + REF_COEF * kl(log_p, log_r))).sum()
    gradient = torch.autograd.grad(loss, list(policy.model.parameters()))
    expected = torch.cat([each.flatten() for each in gradient]).double()
    found, _ = accumulated(policy, rows, ObjectiveConfig(ref_coef=REF_COEF))
    assert relative_error(found, expected) <= 5e-3


def test_a_step_without_any_context_moves_nothing(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    control = [replace(row, teacher_prompt=row.student_prompt) for row in rows]
    gradient, total = accumulated(make_policy(), control, ObjectiveConfig(ref_coef=0.0))
    assert total["kl"] == total["loss"] == 0.0
    assert not gradient.any()


def test_only_the_policy_gets_gradients(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    policy = make_policy(teacher="initial")
    gradient, _ = accumulated(policy, rows, ObjectiveConfig(ref_coef=REF_COEF))
    assert gradient.any()
    assert all(parameter.grad is None for parameter in policy.initial.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap", "cohere-scale", "phi-bias"])
def test_sums_are_those_of_the_dense_loss(
    kind: str, make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, objective = make_policy(kind), ObjectiveConfig(ref_coef=REF_COEF)
    _, expected = dense(policy, rows, objective)
    _, found = accumulated(policy, rows, objective, micro_batch_tokens=30)
    found.pop("teacher_agrees")
    assert found.pop("distilled_weight") == pytest.approx(expected["weight"])
    assert found.pop("distilled_tokens") == expected["tokens"]
    assert found.pop("clipped") == found.pop("router_aux") == found.pop("dropped_mass") == 0
    assert found.pop("kept_share") == pytest.approx(expected["tokens"])  # exact: all columns
    assert found.pop("gradient_mass") > 0
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_engine_is_compared_at_its_own_temperature(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, temperature = make_policy(), 0.6
    (row, *_) = rows
    with torch.no_grad():
        ids = torch.tensor([[*row.student_prompt, *row.response]])
        logits = policy.model(input_ids=ids).logits[0, len(row.student_prompt) - 1 : -1]
    scaled = (logits / temperature).log_softmax(-1)
    own = scaled.gather(-1, torch.tensor(row.response)[:, None])[:, 0]
    off = [0.0, 0.5, -0.25, 0.0]
    engine = replace(row, logprobs=tuple((own + torch.tensor(off)).tolist()))
    sums, largest = accumulate_gradients(
        policy, [engine], ObjectiveConfig(), micro_batch_tokens=64, temperature=temperature
    )
    assert sums[SUMS.index("gap")] == pytest.approx(0.75, abs=1e-4)
    assert largest == pytest.approx(0.5, abs=1e-4)


def test_the_teacher_agrees_with_itself(make_policy: MakePolicy, rows: list[TrainingRow]) -> None:
    control = [replace(row, teacher_prompt=row.student_prompt) for row in rows]
    _, total = accumulated(make_policy(), control, ObjectiveConfig())
    assert total["teacher_agrees"] == total["tokens"] == 14


def test_rows_and_tails_without_weight_enter_no_model(
    make_policy: MakePolicy, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def recorded(model: Any, prompts: Any, responses: Any, **options: Any) -> Tensor:
        seen.extend(responses)
        return response_hidden(model, prompts, responses, **options)

    monkeypatch.setattr(micro_batch, "response_hidden", recorded)
    idle = make_row(0, weights=(0.0,) * 4)
    window = make_row(1, weights=(0.5, 0.5, 0.0, 0.0))
    accumulated(make_policy(), [idle, window], ObjectiveConfig())
    assert set(seen) == {window.response[:2]}


def test_a_rank_without_rows_adds_zero(make_policy: MakePolicy) -> None:
    gradient, total = accumulated(make_policy(), [], ObjectiveConfig())
    assert not gradient.any()
    assert not any(total.values())


def test_the_reference_rests_where_nothing_reads_it(
    make_policy: MakePolicy, rows: list[TrainingRow]
) -> None:
    policy, runs = make_policy(), []
    policy.initial.base_model.register_forward_pre_hook(lambda *_: runs.append(1))
    resting = ObjectiveConfig(ref_coef=((0, 0.0), (4, REF_COEF)), measure_reference=False)
    measured = replace(resting, measure_reference=True)

    def found(objective: ObjectiveConfig, at: int) -> tuple[Tensor, float, int]:
        policy.model.zero_grad(set_to_none=True)
        runs.clear()
        sums, _ = accumulate_gradients(
            policy, rows, objective, micro_batch_tokens=10_000, temperature=1.0, step=at
        )
        flat = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
        return flat, float(sums[SUMS.index("ref_kl")]), len(runs)

    for at, runs_at_rest in ((0, 0), (2, 1)):
        gradient, ref_kl, count = found(resting, at)
        expected, expected_ref_kl, _ = found(measured, at)
        assert relative_error(gradient, expected) <= 1e-6
        assert count == runs_at_rest
        assert expected_ref_kl > 0
        assert ref_kl == (expected_ref_kl if count else 0.0)


def test_what_only_the_loss_reads_is_gone_when_layers_run_backward(
    make_policy: MakePolicy, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, hidden, alive = make_policy(), [], []

    def recorded(model: Any, prompts: Any, responses: Any, **options: Any) -> Tensor:
        states = response_hidden(model, prompts, responses, **options)
        if not states.requires_grad:
            hidden.append(weakref.ref(states))
        return states

    monkeypatch.setattr(micro_batch, "response_hidden", recorded)
    (first, *_) = policy.model.base_model.layers.parameters()
    first.register_post_accumulate_grad_hook(
        lambda _: alive.extend(each for each in hidden if each() is not None)
    )
    accumulated(policy, rows, ObjectiveConfig())
    assert len(hidden) == 2  # of teacher and reference
    assert not alive
