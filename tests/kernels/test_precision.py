"""`precision="difference"`: bf16 logits within 1 % of dense fp64, on both backends."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from kernel_problems import (
    Arguments,
    Draw,
    assert_same_statistics,
    cast,
    regime,
    relative_error,
    solve,
    truth,
)

from hsd_kernels import fused_hsd_loss, plan, precision, vocab_statistics
from hsd_kernels.rows.compiled import compiler_found

CONTRACT = 1e-2  # gradients and KL, relative norm
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def assert_meets_contract(arguments: Arguments, *, backend: str = "cpu"):
    given = arguments | ({} if backend == "cpu" else {"precision": "difference"})
    result, expected = solve(given, backend=backend), truth(arguments)
    assert result.plan.precision == "difference"
    for name, found in result.gradients.items():
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected.gradients[name]) <= CONTRACT, name
    large = expected.stats.kl >= 1e-5
    assert relative_error(result.stats.kl[large], expected.stats.kl[large]) <= CONTRACT
    return result


@pytest.mark.gradient
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0, 11.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_contract(kl, entropy, divergence):
    for offsets in ((0, 0), (-40, -40)):
        arguments = cast(regime(kl, entropy, offsets), torch.bfloat16)
        assert_meets_contract({**arguments, "divergence": divergence})


@pytest.mark.gradient
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_contract_where_the_logits_of_one_side_are_offset(kl, entropy):
    for offsets in ((40, 0), (0, -40)):
        assert_meets_contract(cast(regime(kl, entropy, offsets), torch.bfloat16))


@pytest.mark.gradient
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_contract_where_the_teacher_has_a_head_of_its_own(kl, entropy, divergence):
    """And more hidden dimensions than the student."""
    for offsets in ((0, 0), (40, -40)):
        given = regime(kl, entropy, offsets)
        wider = {
            name: torch.nn.functional.pad(given[of], (0, 2), value=0.5)
            for name, of in (("teacher_hidden", "teacher_hidden"), ("teacher_weight", "weight"))
        }
        arguments = cast({**given, **wider, "divergence": divergence}, torch.bfloat16)
        assert_meets_contract(arguments)


def test_rounded_logits_are_what_the_contract_saves_from():
    """Plain bf16 at the same KLs; otherwise the bound would say nothing."""
    for kl, least in ((1e-4, 0.3), (1e-2, 0.03)):
        arguments = cast(regime(kl, 3.0, (40, 40)), torch.bfloat16)
        exact = truth(arguments).gradients
        rounded = solve(arguments | {"precision": "bf16_logits"}).gradients
        for name, gradient in rounded.items():
            assert relative_error(gradient, exact[name]) >= least, (kl, name)


CASES = {
    "token weights": lambda draw: {"token_weights": draw.masked()},
    "no targets": lambda draw: {"targets": None},
    "shared reference": lambda draw: {"ref_hidden": draw.states(), "ref_coef": 0.3},
    "policy gradient": lambda draw: {
        "advantages": draw.per_token(-1, 1),
        "old_logprobs": draw.per_token(-6, -2),
    },
    "policy gradient, no teacher": lambda draw: {
        "advantages": draw.per_token(-1, 1),
        "teacher_hidden": None,
    },
    "entropy, temperature, scale": lambda draw: {
        "entropy_coef": 0.3,
        "temperature": draw.per_token(0.5, 1.5),
        "logit_scale": -0.6,
    },
    "every set of sides": lambda draw: {
        "ref_hidden": draw.states(),
        "ref_coef": 0.3,
        "divergence": "jsd",
        "jsd_beta": 0.2,
        "token_weights": draw.masked(keep=0.9),
        "kl_weights": draw.masked(),
        "ref_weights": draw.masked().flip(0),
        "advantages": draw.per_token(-1, 1),
    },
    "padded vocabulary": lambda draw: {"vocab_size": draw.vocab - 5, "targets": draw.targets() % 9},
}


def problem(case: str, **draw: object) -> Arguments:
    drawn = Draw(**draw)
    return cast({**drawn.problem(bias=False), **CASES[case](drawn)}, torch.bfloat16)


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_options(case, backend):
    arguments = problem(case) | {"backend": backend, "precision": "difference"}
    if backend == "triton":
        pytest.importorskip("triton")
    del arguments["backend"]
    result, expected = solve(arguments, backend=backend), truth(exact_options(arguments))
    assert result.plan.precision == "difference"
    assert result.plan.backend == backend
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= CONTRACT, name
    assert_same_statistics(result.stats, expected.stats, tolerance=3e-2)


OWN_HEADS = {
    "teacher": lambda draw: {"teacher_weight": draw.head()},
    "reference": lambda draw: {
        "ref_hidden": draw.normal(*draw.lead, draw.hidden + 3),
        "ref_weight": draw.normal(draw.vocab + 2, draw.hidden + 3),
        "ref_coef": 0.3,
    },
    "both, of every set of sides": lambda draw: {
        **CASES["every set of sides"](draw),
        "teacher_weight": draw.head(),
        "ref_weight": draw.head(),
    },
    "teacher, beside a shared reference": lambda draw: {
        **CASES["shared reference"](draw),
        "teacher_weight": draw.head(),
        "token_weights": draw.masked(),
    },
    "reference, in a padded vocabulary": lambda draw: {
        **CASES["padded vocabulary"](draw),
        "ref_hidden": draw.states(),
        "ref_weight": draw.head(),
        "ref_coef": 0.3,
    },
}


@pytest.mark.gradient
@pytest.mark.parametrize("case", OWN_HEADS)
def test_heads_of_their_own(case):
    draw = Draw()
    arguments = cast({**draw.problem(bias=False), **OWN_HEADS[case](draw)}, torch.bfloat16)
    result, expected = solve(arguments), truth(arguments)
    assert result.plan.precision == "difference"
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= CONTRACT, name
    assert_same_statistics(result.stats, expected.stats, tolerance=3e-2)
    with torch.no_grad():
        alone = fused_hsd_loss(**arguments)
    assert alone.plan.precision == "difference"
    assert relative_error(alone.loss, expected.loss) <= CONTRACT


@pytest.mark.gradient
def test_a_head_of_its_own_is_refined_and_may_come_to_fp32_logits(monkeypatch):
    given = steep() | {"teacher_weight": steep()["weight"].clone()}
    arguments = cast(given, torch.bfloat16)
    exact = truth(arguments)
    refined = solve(arguments)
    assert 0 < refined.plan.refined_columns < 100
    for name, gradient in exact.gradients.items():
        assert relative_error(refined.gradients[name], gradient) <= CONTRACT
    monkeypatch.setattr(precision, "TOLERANCE", 1e-6)
    draw = Draw((40,))
    other = cast({**draw.problem(bias=False), "teacher_weight": draw.head()}, torch.bfloat16)
    repeated, exact = solve(other), truth(other)
    assert repeated.plan.repeated_chunks == repeated.plan.chunks
    for name, gradient in exact.gradients.items():
        assert relative_error(repeated.gradients[name], gradient) <= 5e-3


def test_on_triton_a_head_of_its_own_has_fp32_logits():
    pytest.importorskip("triton")
    arguments = problem("no targets") | {"precision": "difference"}
    arguments["teacher_weight"] = arguments["weight"].clone()
    assert solve(arguments, backend="triton").plan.precision == "fp32_logits"


def exact_options(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name != "precision"}


@pytest.mark.gradient
@pytest.mark.parametrize(("kl", "entropy"), [(1e-4, 3.0), (1e-2, 0.1), (10.0, 3.0)])
def test_contract_on_triton(kl, entropy):
    pytest.importorskip("triton")
    arguments = cast(regime(kl, entropy, (40, 40)), torch.bfloat16)
    assert_meets_contract(arguments, backend="triton")


# Statistics alone


def assert_statistics_meet_contract(arguments: Arguments, *, distance: float = 0.0):
    """The teacher is `distance` nats away, and its hidden states are known to 8 bits of that."""
    with torch.no_grad():
        out = fused_hsd_loss(**arguments)
    expected = truth(arguments).stats
    assert out.plan.precision == "difference"
    assert out.plan.gemms == 2
    assert out.stats.gradient_mass is None
    large = expected.kl >= 1e-5
    assert relative_error(out.stats.kl[large], expected.kl[large]) <= CONTRACT
    for name, nats in (("logprob", 1), ("entropy", 1), ("teacher_logprob", max(1, distance))):
        error = (getattr(out.stats, name) - getattr(expected, name)).square().mean().sqrt()
        assert error <= CONTRACT * nats, name
    return out


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0, 11.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
def test_contract_of_statistics_alone(kl, entropy, divergence):
    for offsets in ((0, 0), (40, 40), (0, 40)):
        given = regime(kl, entropy, offsets)
        targets = torch.arange(len(given["student_hidden"]))
        arguments = cast({**given, "targets": targets}, torch.bfloat16)
        assert_statistics_meet_contract({**arguments, "divergence": divergence}, distance=kl)


@pytest.mark.parametrize("case", ["shared reference", "padded vocabulary", "token weights"])
def test_options_of_statistics_alone(case):
    arguments = problem(case)
    with torch.no_grad():
        out = fused_hsd_loss(**arguments)
    expected = truth(arguments)
    assert out.plan.precision == "difference"
    assert_same_statistics(out.stats, expected.stats, tolerance=1e-2)
    assert relative_error(out.loss, expected.loss) <= CONTRACT


def test_statistics_alone_are_refined_and_checked(monkeypatch):
    """Of many rows: of fewer than 128, all are read for their error."""
    arguments = cast(steep(rows=200), torch.bfloat16) | {"targets": torch.full((200,), 41)}
    exact = truth(arguments).stats
    found = assert_statistics_meet_contract(arguments)
    assert found.plan.refined_columns > 0
    assert found.plan.repeated_chunks == 0
    monkeypatch.setattr(precision, "LIKELY_SHARE", 0.0)
    checked = assert_statistics_meet_contract(arguments)
    assert checked.plan.repeated_chunks == checked.plan.chunks
    assert relative_error(checked.stats.kl, exact.kl) <= 1e-3
    monkeypatch.setattr(precision, "TOLERANCE", 1.0)
    with torch.no_grad():
        rounded = fused_hsd_loss(**arguments)
    assert rounded.plan.repeated_chunks == rounded.plan.refined_columns == 0
    error = relative_error(rounded.stats.kl, exact.kl)
    assert error > 1.5 * relative_error(found.stats.kl, exact.kl)


@pytest.mark.gradient
@pytest.mark.parametrize("names", [("forward_kl", "entropy"), ("entropy", "teacher_entropy")])
def test_vocab_statistics_and_their_backward(names):
    given = cast(regime(1e-2, 3.0, (40, 40)), torch.bfloat16)
    exact = cast(given, torch.float64)

    def solved(values, **options):
        leaves = {n: values[n].clone().requires_grad_() for n in ("student_hidden", "weight")}
        found = vocab_statistics(**{**values, **leaves}, statistics=names, **options)
        sum(getattr(found, name).sum() for name in names).backward()
        return found, leaves

    (found, own), (true, expected) = solved(given), solved(exact, backend="reference")
    for name in names:
        assert relative_error(getattr(found, name), getattr(true, name)) <= CONTRACT, name
    for name, leaf in own.items():
        assert relative_error(leaf.grad, expected[name].grad) <= CONTRACT, name


# Refinement


def steep(rows: int = 16, vocab: int = 3000) -> Arguments:
    """A few columns 30 nats above the others, which no probe hits, take turns to be likely."""
    draw = Draw((rows,), 8, vocab)
    weight = draw.head()
    likely = torch.arange(8) * 311 + 41
    weight[likely] += 9 * torch.eye(8, dtype=torch.float64)
    student = 2 * draw.states()
    student[:, :] += 1.5
    return {
        "student_hidden": student,
        "teacher_hidden": student + 0.05 * draw.states(),
        "weight": weight,
    }


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_columns_are_refined_where_rounding_would_show(backend, monkeypatch):
    arguments = cast(steep(), torch.bfloat16) | {"precision": "difference"}
    exact = truth(exact_options(arguments))
    refined = solve(arguments, backend=backend)
    assert 0 < refined.plan.refined_columns < 100
    assert refined.plan.repeated_chunks == 0
    monkeypatch.setattr(precision, "TOLERANCE", 1.0)
    monkeypatch.setattr(precision, "LIKELY_SHARE", 0.0)
    rounded = solve(arguments, backend=backend)
    assert rounded.plan.refined_columns == 0
    for name, gradient in exact.gradients.items():
        error = relative_error(refined.gradients[name], gradient)
        assert error <= CONTRACT
        assert relative_error(rounded.gradients[name], gradient) > 1.5 * error


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_chunk_that_needs_too_many_columns_has_fp32_logits(backend, monkeypatch):
    """In the memory of the bf16 ones: no row fits there twice as wide, but fewer rows do."""
    monkeypatch.setattr(precision, "TOLERANCE", 1e-6)
    arguments = problem("token weights", lead=(40,)) | {"precision": "difference"}
    row_bytes = 37 * 2 * 2 + 5 * 2 * 4
    result = solve(arguments | {"max_chunk_bytes": 9 * row_bytes}, backend=backend)
    assert result.plan.repeated_chunks == result.plan.chunks > 1
    expected = truth(exact_options(arguments))
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 5e-3, name
    alone = solve(arguments | {"max_chunk_bytes": row_bytes}, backend=backend)
    assert alone.plan.repeated_chunks == alone.plan.chunks == alone.plan.rows
    for name, gradient in alone.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 5e-3, name


def test_identical_sides_have_no_loss_and_no_gradient():
    given = problem("no targets")
    given["teacher_hidden"] = given["student_hidden"].clone()
    for divergence in DIVERGENCES:
        result = solve(given | {"divergence": divergence})
        assert result.plan.precision == "difference"
        assert result.loss == 0
        assert all(gradient.count_nonzero() == 0 for gradient in result.gradients.values())


@pytest.mark.gradient
def test_sparse_backward_and_accumulator():
    given = cast(steep(), torch.bfloat16)
    total = torch.zeros(given["weight"].shape)
    options = {"sparse_tolerance": 1e-3, "weight_grad_out": total}
    result, expected = solve(given | options), truth(given)
    assert result.plan.precision == "difference"
    assert 0 < result.stats.dropped_mass.sum() <= 1e-3 * result.stats.gradient_mass.sum()
    assert relative_error(total, expected.gradients["weight"]) <= CONTRACT
    found = result.gradients["student_hidden"]
    assert relative_error(found, expected.gradients["student_hidden"]) <= CONTRACT


@pytest.mark.gradient
@pytest.mark.slow
@pytest.mark.skipif(not compiler_found(), reason="torch.compile finds no C++ compiler")
def test_compiled():
    arguments = cast(steep(rows=1500), torch.bfloat16)
    result, expected = solve(arguments), truth(arguments)
    assert result.plan.fused
    assert result.plan.refined_columns > 0
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= CONTRACT, name


# What it does not combine with


@pytest.mark.parametrize(
    "options",
    [
        {"bias": torch.zeros(37)},
        {"teacher_weight": torch.ones(37, 8), "teacher_bias": torch.ones(37)},
        {"logit_softcap": 30.0},
        {"kl_temperature": 0.7},
        {"teacher_temperature": 0.7},
        {"logit_scale": 0.0},
        {"top_k": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_has_no_difference_form_has_fp32_logits(options):
    arguments = problem("no targets") | cast(options, torch.bfloat16)
    result = solve(arguments | {"precision": "difference"})
    assert result.plan.precision == "fp32_logits"
    same = solve(arguments | {"precision": "fp32_logits"})
    for name, gradient in same.gradients.items():
        assert torch.equal(result.gradients[name], gradient)


def test_log_probs_alone_and_statistics_on_triton_have_fp32_logits():
    given = problem("policy gradient, no teacher")
    with torch.no_grad():
        assert fused_hsd_loss(**given).plan.precision == "fp32_logits"
        if find_spec("triton"):
            given = problem("no targets") | {"precision": "difference"}
            assert fused_hsd_loss(**given, backend="triton").plan.precision == "fp32_logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype):
    arguments = cast(problem("no targets"), dtype) | {"precision": "difference"}
    with pytest.raises(ValueError, match=r"precision: found 'difference' with torch\.float"):
        fused_hsd_loss(**arguments)
    with pytest.raises(ValueError, match="precision: found 'difference' with backend='reference'"):
        fused_hsd_loss(**cast(arguments, torch.bfloat16), backend="reference")


def test_auto_is_fp32_on_other_backends_and_dtypes():
    given = problem("no targets")
    assert solve(given, backend="triton").plan.precision == "fp32_logits"
    assert solve(cast(given, torch.float16)).plan.precision == "fp32_logits"


def test_plan_says_beforehand_what_runs():
    arguments = problem("no targets", lead=(40,)) | {"max_chunk_bytes": 5_000}
    result = solve(arguments)
    options = {"max_chunk_bytes": 5_000, "compiled": compiler_found(), "narrow": True}
    predicted = plan(40, 8, 37, precision="difference", **options)
    own_head = {"teacher_weight": arguments["weight"].clone()}
    joined = solve(arguments | own_head).plan
    expected = vars(plan(40, 8, 37, precision="difference", copied_heads=1, **options))
    assert vars(joined) == expected | {"refined_columns": joined.refined_columns}
    assert joined.gemms == 5
    unknown = {"refined_columns": result.plan.refined_columns, "repeated_chunks": 0}
    assert vars(result.plan) == vars(predicted) | unknown
    assert result.plan.chunks > 1
    assert result.plan.synchronisations == 1 + result.plan.chunks
