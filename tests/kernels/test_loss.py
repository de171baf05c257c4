"""fused_hsd_loss on the CPU against the dense reference in fp64: every option, gradient, statistic.

A problem is rounded to the dtype under test first, so that both see the same values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from kernel_problems import (
    Arguments,
    Draw,
    assert_matches,
    assert_same_statistics,
    cast,
    regime,
    relative_error,
    solve,
    truth,
)

from hsd_kernels import fused_hsd_loss, plan
from hsd_kernels.rows.compiled import compiler_found

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def shared_reference(draw: Draw) -> Arguments:
    return {"ref_hidden": draw.states(), "ref_coef": 0.3}


def own_reference(draw: Draw) -> Arguments:
    return {
        "ref_hidden": draw.states(5),
        "ref_weight": draw.head(5),
        "ref_bias": draw.normal(draw.vocab),
        "ref_coef": 0.3,
    }


def own_teacher(draw: Draw) -> Arguments:
    return {"teacher_hidden": draw.states(5), "teacher_weight": draw.head(5, draw.vocab + 3)}


def policy_gradient(draw: Draw) -> Arguments:
    return {"advantages": draw.per_token(-1, 1), "old_logprobs": draw.per_token(-6, -2)}


def weights_per_term(draw: Draw) -> Arguments:
    """Zeros of each term in other rows: tokens run with any of the four sets of sides."""
    return {
        **shared_reference(draw),
        **policy_gradient(draw),
        "token_weights": draw.masked(keep=0.9),
        "kl_weights": draw.masked(),
        "ref_weights": draw.masked().flip(0),
        "pg_weights": draw.masked(),
    }


def temperatures_per_token(draw: Draw) -> Arguments:
    return {
        "temperature": draw.per_token(0.5, 1.5),
        "kl_temperature": draw.per_token(0.5, 1.5),
        "teacher_temperature": draw.per_token(0.5, 1.5),
    }


def everything(draw: Draw) -> Arguments:
    return {
        **weights_per_term(draw),
        **temperatures_per_token(draw),
        "divergence": "jsd",
        "jsd_beta": 0.2,
        "jsd_convention": "scaled",
        "token_kl_cap": 0.4,
        "entropy_coef": 0.05,
        "pg_coef": 0.7,
        "kl_coef": 1.3,
        "logit_scale": 0.8,
        "logit_softcap": 4.0,
        "vocab_size": draw.vocab - 5,
        "targets": draw.targets() % (draw.vocab - 5),
    }


CASES: dict[str, Callable[[Draw], Arguments]] = {
    "forward_kl": lambda draw: {},
    "reverse_kl": lambda draw: {"divergence": "reverse_kl"},
    "jsd": lambda draw: {"divergence": "jsd"},
    "jsd beta 0": lambda draw: {"divergence": "jsd", "jsd_beta": 0},
    "jsd beta 1e-3": lambda draw: {"divergence": "jsd", "jsd_beta": 1e-3},
    "jsd beta 1 - 1e-3": lambda draw: {"divergence": "jsd", "jsd_beta": 1 - 1e-3},
    "jsd beta 1": lambda draw: {"divergence": "jsd", "jsd_beta": 1},
    "jsd interior": lambda draw: {
        "divergence": "jsd",
        "jsd_beta": 0.3,
        "jsd_convention": "interior",
    },
    "jsd scaled": lambda draw: {"divergence": "jsd", "jsd_beta": 0.3, "jsd_convention": "scaled"},
    "no bias": lambda draw: {"bias": None},
    "no targets": lambda draw: {"targets": None},
    "kl_coef": lambda draw: {"kl_coef": 0.4},
    "shared reference": shared_reference,
    "own reference": own_reference,
    "reference that is only reported": lambda draw: {"ref_hidden": draw.states()},
    "reference without a teacher": lambda draw: {
        **shared_reference(draw),
        "teacher_hidden": None,
    },
    "own teacher": own_teacher,
    "own teacher with a bias": lambda draw: {
        **own_teacher(draw),
        "teacher_bias": draw.normal(draw.vocab + 3),
    },
    "own teacher, shared reference": lambda draw: {
        **own_teacher(draw),
        **shared_reference(draw),
    },
    "own teacher and reference": lambda draw: {**own_teacher(draw), **own_reference(draw)},
    "policy gradient": policy_gradient,
    "policy gradient at ratio 1": lambda draw: {"advantages": draw.per_token(-1, 1)},
    "policy gradient, no teacher": lambda draw: {**policy_gradient(draw), "teacher_hidden": None},
    "asymmetric clip": lambda draw: {**policy_gradient(draw), "clip_range": (0.1, 0.5)},
    "entropy": lambda draw: {"entropy_coef": 0.3},
    "entropy alone": lambda draw: {"entropy_coef": -0.3, "teacher_hidden": None},
    "token weights": lambda draw: {"token_weights": draw.masked()},
    "weights per term": weights_per_term,
    "token_kl_cap": lambda draw: {"token_kl_cap": 0.15},
    "temperature": lambda draw: {"temperature": 0.7},
    "kl_temperature": lambda draw: {"kl_temperature": 1.6, "entropy_coef": 0.3},
    "teacher_temperature": lambda draw: {"teacher_temperature": 0.7},
    "temperatures per token": lambda draw: {**temperatures_per_token(draw), "entropy_coef": 0.3},
    "logit_scale": lambda draw: {"logit_scale": -0.6},
    "softcap": lambda draw: {"logit_softcap": 1.5},
    "softcap and temperatures": lambda draw: {
        **temperatures_per_token(draw),
        "logit_softcap": 1.5,
    },
    "vocab_size": lambda draw: {"vocab_size": draw.vocab - 5, "targets": draw.targets() % 30},
    "everything": everything,
    "everything, own teacher": lambda draw: {**everything(draw), **own_teacher(draw)},
}


def problem(case: str = "everything", dtype: torch.dtype = torch.float32, **draw) -> Arguments:
    drawn = Draw(**draw)
    base = drawn.problem()
    return cast({**base, **CASES[case](drawn)}, dtype)


@pytest.mark.gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_option(case, dtype):
    arguments = problem(case, dtype)
    assert_matches(solve(arguments), truth(arguments), tolerance=TOLERANCE[dtype])


@pytest.mark.gradient
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ["forward_kl", "jsd", "own teacher and reference", "everything"])
def test_narrow_inputs_get_narrow_gradients_of_fp32_accuracy(case, dtype):
    arguments = problem(case, dtype)
    result = solve(arguments)
    assert {gradient.dtype for gradient in result.gradients.values()} == {dtype}
    assert result.loss.dtype == result.stats.kl.dtype == torch.float32
    assert result.plan.precision == "fp32_logits"
    expected = truth(arguments)
    assert_matches(result, expected, tolerance=TOLERANCE[dtype])
    assert_same_statistics(result.stats, expected.stats, tolerance=1e-3)


@pytest.mark.gradient
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0, 11.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_contract_where_student_and_teacher_share_the_head(kl, entropy, divergence):
    for offset in (0, 40, -40):
        arguments = cast(regime(kl, entropy, (offset, offset)), torch.float32)
        assert_meets_contract({**arguments, "divergence": divergence})


@pytest.mark.gradient
@pytest.mark.parametrize("own_head", [False, True], ids=["shared head", "own head"])
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0])
@pytest.mark.parametrize("kl", [1e-2, 1.0, 10.0])
def test_contract_where_the_logits_of_one_side_are_offset(kl, entropy, own_head):
    for offsets in ((40, 0), (0, -40)):
        arguments = cast(regime(kl, entropy, offsets), torch.float32)
        own = {"teacher_weight": arguments["weight"].clone()} if own_head else {}
        assert_meets_contract(arguments | own)


@pytest.mark.gradient
@pytest.mark.parametrize("own_head", [False, True], ids=["shared head", "own head"])
@pytest.mark.parametrize("offsets", [(40, 0), (0, -40), (40, 40)])
def test_offset_logits_at_kl_1e_4_cost_no_more_than_their_rounding_to_fp32(offsets, own_head):
    """Where 40 nats enter a stored fp32 number, that number is known to 2e-6; log p/q is 1e-2.

    Only logits of more than fp32 could meet the 1e-4 of the contract here.
    """
    arguments = cast(regime(1e-4, 3.0, offsets), torch.float32)
    own = {"teacher_weight": arguments["weight"].clone()} if own_head else {}
    assert_meets_contract(arguments | own, gradient=5e-4)


def assert_meets_contract(arguments: Arguments, *, gradient: float = 1e-4) -> None:
    """Gradients to 1e-4, KL to 1e-3 from 1e-5 nats."""
    result, expected = solve(arguments), truth(arguments)
    for name, found in result.gradients.items():
        assert relative_error(found, expected.gradients[name]) <= gradient, name
    large = expected.stats.kl >= 1e-5
    assert relative_error(result.stats.kl[large], expected.stats.kl[large]) <= 1e-3


@pytest.mark.gradient
@pytest.mark.skipif(not compiler_found(), reason="torch.compile finds no C++ compiler")
def test_compiled_elementwise_work(monkeypatch):
    # The package's `plan` is the function.
    monkeypatch.setattr(sys.modules["hsd_kernels.plan"], "SMALLEST_FUSED_ELEMENTS", 0)
    draw = Draw()
    recipe = draw.problem() | shared_reference(draw) | policy_gradient(draw)
    arguments = cast(recipe | {"token_weights": draw.masked()}, torch.float32)
    result = solve(arguments)
    assert result.plan.fused
    assert_matches(result, truth(arguments))


@pytest.mark.gradient
def test_gradcheck():
    draw = Draw((2,), 3, 7)
    # Own heads: finite differences would move a shared one on all sides.
    arguments = draw.problem() | own_teacher(draw) | own_reference(draw)
    arguments |= {"divergence": "jsd", "entropy_coef": 0.2}

    def loss(student, weight, bias):
        learned = {"student_hidden": student, "weight": weight, "bias": bias}
        return fused_hsd_loss(**{**arguments, **learned}, backend="cpu").loss

    leaves = [arguments[name].requires_grad_() for name in ("student_hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(loss, leaves, raise_exception=False)


# Shapes and layouts


@pytest.mark.gradient
@pytest.mark.parametrize("lead", [(1, 6), (2, 6), (2, 3, 2)])
def test_leading_shape_is_kept(lead):
    arguments = problem("forward_kl", lead=lead)
    result = solve(arguments)
    assert result.stats.kl.shape == result.stats.computed.shape == lead
    assert_matches(result, truth(arguments))


@pytest.mark.gradient
@pytest.mark.parametrize("rows_per_chunk", [1, 7])
@pytest.mark.parametrize(("case", "buffers"), [("forward_kl", 2), ("everything", 4)])
def test_chunks_change_nothing(case, buffers, rows_per_chunk):
    arguments = problem(case, lead=(40,))
    row_bytes = buffers * arguments.get("vocab_size", 37) * 4
    small = solve(arguments | {"max_chunk_bytes": rows_per_chunk * row_bytes})
    whole = solve(arguments)
    assert small.plan.rows_per_chunk <= rows_per_chunk
    assert small.plan.chunks >= small.plan.rows / rows_per_chunk
    assert_matches(small, truth(arguments))
    assert_matches(small, whole, tolerance=1e-6)


@pytest.mark.gradient
def test_order_of_rows_does_not_matter():
    arguments = problem("everything")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    permuted = {
        name: value[order]
        if isinstance(value, torch.Tensor) and len(value) == 12 and name != "weight"
        else value
        for name, value in arguments.items()
    }
    result, expected = solve(permuted), truth(arguments)
    expected.gradients["student_hidden"] = expected.gradients["student_hidden"][order]
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 1e-4


@pytest.mark.gradient
def test_padded_vocabulary_rows_change_nothing_and_get_no_gradient():
    used = problem("forward_kl")
    padding = torch.full((5, 8), 1e30)
    padding[0] = torch.nan
    padded = {
        **used,
        "weight": torch.cat([used["weight"], padding]),
        "bias": torch.cat([used["bias"], padding[:, 0]]),
        "vocab_size": 37,
    }
    result = solve(padded)
    for name in ("weight", "bias"):
        assert result.gradients[name][37:].count_nonzero() == 0
        result.gradients[name] = result.gradients[name][:37]
    assert_matches(result, truth(used))


# autograd


@pytest.mark.gradient
def test_backward_twice_through_a_retained_graph():
    arguments = problem()
    leaves = learned(arguments)
    loss = fused_hsd_loss(**arguments | leaves).loss
    loss.backward(retain_graph=True)
    loss.backward()
    expected = truth(arguments).gradients
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, 2 * expected[name]) <= 1e-4


@pytest.mark.gradient
def test_gradients_accumulate_over_calls():
    batches = [problem(seed=0), problem(seed=1)]
    batches[1] |= {name: batches[0][name] for name in ("weight", "bias")}
    leaves = learned(batches[0])
    for batch in batches:
        leaves["student_hidden"] = batch["student_hidden"].detach().requires_grad_()
        fused_hsd_loss(**batch | leaves).loss.backward()
        expected = truth(batch).gradients["student_hidden"]
        assert relative_error(leaves["student_hidden"].grad, expected) <= 1e-4
    for name in ("weight", "bias"):
        expected = sum(truth(batch).gradients[name] for batch in batches)
        assert relative_error(leaves[name].grad, expected) <= 1e-4


@pytest.mark.gradient
def test_gradients_flow_into_what_computed_the_hidden_states():
    arguments = problem("forward_kl")
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def gradient(dtype: torch.dtype, backend: str) -> torch.Tensor:
        leaf = mixing.to(dtype).requires_grad_()
        given = cast(arguments, dtype)
        hidden = given["student_hidden"] @ leaf
        fused_hsd_loss(**{**given, "student_hidden": hidden}, backend=backend).loss.backward()
        return leaf.grad

    exact = gradient(torch.float64, "reference")
    assert relative_error(gradient(torch.float32, "cpu"), exact) <= 1e-4


@pytest.mark.gradient
@pytest.mark.parametrize(
    "frozen",
    [("weight", "bias"), ("student_hidden",), ("student_hidden", "weight"), ("bias",)],
    ids=" and ".join,
)
@pytest.mark.parametrize("case", ["forward_kl", "temperatures per token"])
def test_frozen(frozen, case):
    arguments = problem(case)
    result = solve(arguments, frozen=frozen)
    assert result.gradients.keys().isdisjoint(frozen)
    assert_matches(result, truth(arguments, frozen=frozen))


def test_no_grad_forms_no_gradient():
    arguments = problem()
    expected = solve(arguments)
    with torch.no_grad():
        out = fused_hsd_loss(**arguments | learned(arguments))
    assert not out.loss.requires_grad
    assert out.stats.gradient_mass is None
    assert out.plan.gemms < expected.plan.gemms
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend):
    arguments = problem()
    leaves = learned(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_hsd_loss(**arguments | leaves, backend=backend)
    out.loss.backward()
    expected = truth(arguments)
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, expected.gradients[name]) <= 1e-4
    assert_same_statistics(out.stats, expected.stats, tolerance=1e-4)


def test_a_second_derivative_is_refused():
    arguments = problem("forward_kl")
    leaves = learned(arguments)
    loss = fused_hsd_loss(**arguments | leaves).loss
    (gradient,) = torch.autograd.grad(loss, leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.* expected backend='reference'"):
        gradient.square().sum().backward()


def test_inputs_are_left_alone():
    arguments = problem()
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
    solve(arguments)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.gradient
def test_the_same_call_gives_the_same_bits():
    arguments = problem()
    first, second = solve(arguments), solve(arguments)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(g, second.gradients[name]) for name, g in first.gradients.items())
    assert_matches(first, truth(arguments))


# Rows without weight


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (3,)])
def test_no_active_row_gives_a_zero_loss_with_a_graph(lead, backend):
    arguments = problem("forward_kl", lead=lead) | {"token_weights": torch.zeros(lead)}
    result = solve(arguments, backend=backend)
    assert result.loss == 0
    assert result.gradients.keys() == {"student_hidden", "weight", "bias"}
    assert all(gradient.count_nonzero() == 0 for gradient in result.gradients.values())
    assert result.stats.kl.shape == lead
    assert result.stats.kl.isnan().all()


def test_statistics_are_nan_exactly_where_they_were_not_computed():
    arguments = problem("weights per term")
    stats = solve(arguments).stats
    active = arguments["token_weights"] != 0
    with_teacher = active & (arguments["kl_weights"] != 0)
    with_reference = active & (arguments["ref_weights"] != 0)
    assert 0 < with_teacher.sum() < active.sum() < len(active)
    assert torch.equal(stats.computed, active)
    for name in ("logprob", "entropy", "lse", "gradient_mass", "dropped_mass", "kept_columns"):
        assert torch.equal(~getattr(stats, name).isnan(), active), name
    for name in ("kl", "teacher_logprob", "teacher_entropy", "teacher_lse", "top1_agree"):
        assert torch.equal(~getattr(stats, name).isnan(), with_teacher), name
    assert torch.equal(~stats.ref_kl.isnan(), with_reference)


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_per_token_values_of_rows_without_weight_do_not_matter(backend):
    arguments = problem("everything")
    idle = arguments["token_weights"] == 0
    changed = {
        **arguments,
        "targets": arguments["targets"].masked_fill(idle, -100),
        "advantages": arguments["advantages"].masked_fill(idle, torch.nan),
        "old_logprobs": arguments["old_logprobs"].masked_fill(idle, -torch.inf),
        "kl_weights": arguments["kl_weights"].masked_fill(idle, torch.nan),
    }
    assert_matches(solve(changed, backend=backend), truth(arguments))


@pytest.mark.gradient
def test_hidden_states_of_rows_without_weight_do_not_matter():
    arguments = problem("token weights")
    idle = arguments["token_weights"] == 0
    changed = {
        name: arguments[name].masked_fill(idle[:, None], torch.nan)
        for name in ("student_hidden", "teacher_hidden")
    }
    assert_matches(solve(arguments | changed), truth(arguments))


# Statistics and plan


def test_token_weights_default_to_the_mean():
    arguments = problem("forward_kl")
    result = solve(arguments)
    torch.testing.assert_close(result.loss, result.stats.kl.mean())


def test_token_kl_cap_bounds_the_loss_and_not_the_reported_kl():
    arguments = problem("token_kl_cap")
    result = solve(arguments)
    assert result.stats.kl.max() > 0.15
    torch.testing.assert_close(result.loss, result.stats.kl.clamp(max=0.15).mean())


def test_the_clip_is_active_on_both_sides():
    """What "policy gradient" among the cases covers."""
    arguments = problem("policy gradient")
    ratio = (solve(arguments).stats.logprob - arguments["old_logprobs"]).exp()
    advantages = arguments["advantages"]
    assert ((ratio > 1.2) & (advantages > 0)).any()
    assert ((ratio < 0.8) & (advantages < 0)).any()


@pytest.mark.parametrize("case", ["forward_kl", "kl_temperature", "softcap"])
def test_gradient_mass_is_the_l1_norm_of_the_logit_gradient(case):
    draw = Draw((5,), 9, 9)
    arguments = draw.problem(bias=False) | CASES[case](draw) | {"teacher_hidden": None}
    arguments |= {"weight": torch.eye(9, dtype=torch.float64), "ref_hidden": draw.states()}
    arguments |= {"ref_coef": 1.0}
    result = solve(arguments)  # under an identity head hidden states are logits
    torch.testing.assert_close(
        result.stats.gradient_mass, result.gradients["student_hidden"].abs().sum(-1)
    )
    assert result.stats.dropped_mass.count_nonzero() == 0


def test_statistics_are_detached():
    arguments = problem()
    for backend in ("cpu", "reference"):
        stats = solve(arguments, backend=backend).stats
        tensors = [value for value in vars(stats).values() if value is not None]
        assert not any(value.requires_grad for value in tensors)


def test_rows_without_a_kl_weight_cost_no_teacher():
    arguments = problem("forward_kl") | {"kl_weights": torch.tensor([1.0] * 3 + [0.0] * 9)}
    some, none = solve(arguments), solve(arguments | {"kl_weights": torch.zeros(12)})
    assert some.plan.gemms == pytest.approx(2 + 1 + 3 / 12)
    assert none.plan.gemms == 3
    assert some.plan.rows == none.plan.rows == 12


def test_the_teacher_is_not_read_in_rows_without_a_kl_weight():
    arguments = problem("forward_kl") | {"kl_weights": torch.tensor([1.0] * 3 + [0.0] * 9)}
    arguments["entropy_coef"] = 0.1
    arguments["teacher_hidden"][3:] = torch.nan
    assert solve(arguments).loss.isfinite()


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("forward_kl", {}),
        ("shared reference", {"reference": True}),
        ("entropy alone", {"teacher": False}),
        ("kl_temperature", {"temperatures": 2}),
    ],
)
def test_plan_says_beforehand_what_runs(case, options):
    arguments = problem(case, lead=(40,)) | {"max_chunk_bytes": 5_000}
    predicted = plan(40, 8, 37, max_chunk_bytes=5_000, compiled=compiler_found(), **options)
    assert solve(arguments).plan == predicted


def test_plan_matches_the_gemms_that_ran(monkeypatch):
    flops = []
    for name in ("mm", "matmul"):
        original = getattr(torch, name)

        def counted(a, b, *args, original=original, **kwargs):
            flops.append(a.shape[0] * a.shape[1] * b.shape[1])
            return original(a, b, *args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    arguments = problem("shared reference", lead=(40,)) | {"max_chunk_bytes": 5_000}
    with torch.no_grad():
        out = fused_hsd_loss(**arguments)
    assert sum(flops) == out.plan.gemms * out.plan.rows * 8 * 37
    assert out.plan.chunks > 1


def test_bf16_logits_are_there_for_comparison_and_are_worse():
    arguments = cast(regime(1e-3, 3.0), torch.float32)
    exact = truth(arguments).gradients["student_hidden"]
    rounded = solve(arguments | {"precision": "bf16_logits"})
    assert rounded.plan.precision == "bf16_logits"
    assert relative_error(rounded.gradients["student_hidden"], exact) > 0.05


def learned(arguments: Arguments) -> dict[str, torch.Tensor]:
    """Fresh leaves of a problem."""
    return {
        name: arguments[name].detach().requires_grad_()
        for name in ("student_hidden", "weight", "bias")
    }
