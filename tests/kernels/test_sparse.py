"""The certified sparse backward, the head's accumulator and the most likely tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_problems import Draw, cast, relative_error, solve, truth

from hsd_kernels import fused_hsd_loss
from hsd_kernels.sparse import kept_columns


def peaked(rows: int = 24, vocab: int = 600) -> dict[str, Any]:
    """Sharp distributions: the gradient has its mass in few columns."""
    draw = Draw((rows,), 8, vocab)
    given = draw.problem(near=0.5)
    given["weight"] = 4 * given["weight"]
    return cast(given | {"token_weights": draw.masked()}, torch.float32)


@pytest.mark.gradient
@pytest.mark.parametrize("tolerance", [1e-6, 0.01])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_certificate_holds_and_bounds_the_error(tolerance, chunks):
    given = peaked()
    sparse = solve(
        given
        | {
            "sparse_tolerance": tolerance,
            "sparse_max_columns": 600,
            "max_chunk_bytes": 2 * 600 * 4 * 24 // chunks,
        }
    )
    stats, exact = sparse.stats, truth(given)
    active = given["token_weights"] != 0
    mass, dropped = stats.gradient_mass[active], stats.dropped_mass[active]
    assert dropped.sum() <= tolerance * mass.sum()
    assert (dropped <= mass).all()
    error = (sparse.gradients["student_hidden"] - exact.gradients["student_hidden"]).norm(dim=-1)
    bound = dropped * given["weight"].norm(dim=-1).max()
    rounding = 1e-4 * exact.gradients["student_hidden"].norm()
    assert (error[active] <= bound + rounding).all()
    for name in ("student_hidden", "weight", "bias"):
        found, wanted = sparse.gradients[name], exact.gradients[name]
        assert relative_error(found, wanted) <= 1e-4 + 2 * tolerance, name


def test_columns_are_the_fewest_that_hold_the_mass():
    mass = torch.tensor([16.0, 0.0, 2.0, 1.0])
    assert kept_columns(mass, tolerance=0.2, max_columns=4).tolist() == [0]
    assert kept_columns(mass, tolerance=0.1, max_columns=4).tolist() == [0, 2]
    assert kept_columns(mass, tolerance=0.01, max_columns=4).tolist() == [0, 2, 3]
    assert kept_columns(mass, tolerance=0.01, max_columns=2) is None
    assert kept_columns(mass * 0, tolerance=0.1, max_columns=4) is not None


def test_a_chunk_that_needs_too_many_columns_runs_dense():
    given = peaked()
    options = {"sparse_tolerance": 1e-6, "sparse_max_columns": 1}
    sparse, dense = solve(given | options), solve(given)
    for name, gradient in dense.gradients.items():
        assert torch.equal(sparse.gradients[name], gradient)
    assert sparse.stats.dropped_mass.nan_to_num().count_nonzero() == 0
    assert sparse.plan.synchronisations == dense.plan.synchronisations + sparse.plan.chunks


def test_kept_columns_are_those_that_the_gradient_of_the_head_has():
    given = peaked() | {"sparse_tolerance": 0.05}
    sparse, dense = solve(given), solve(peaked())
    active = given["token_weights"] != 0
    touched = int((sparse.gradients["weight"] != 0).any(-1).sum())
    assert (sparse.stats.kept_columns[active] == touched).all() and touched < 300
    assert (dense.stats.kept_columns[active] == 600).all()
    assert sparse.stats.kept_columns[~active].isnan().all()


def test_something_is_dropped_where_the_tolerance_allows_it():
    stats = solve(peaked() | {"sparse_tolerance": 0.05}).stats
    assert 0 < stats.dropped_mass.nansum() <= 0.05 * stats.gradient_mass.nansum()


@pytest.mark.gradient
def test_the_accumulator_takes_the_heads_gradient_over_micro_batches():
    batches = [peaked(), peaked(rows=10)]
    for batch in batches:
        batch["weight"], batch["bias"] = batches[0]["weight"], batches[0]["bias"]
    accumulator = torch.zeros_like(batches[0]["weight"])
    expected = torch.zeros_like(accumulator, dtype=torch.float64)
    for batch in batches:
        student = batch["student_hidden"].detach().requires_grad_()
        weight = batch["weight"].detach().requires_grad_()
        out = fused_hsd_loss(
            **{**batch, "student_hidden": student, "weight": weight, "bias": batch["bias"]},
            weight_grad_out=accumulator,
        )
        out.loss.backward()
        exact = truth(batch, frozen=("bias",)).gradients
        expected += exact["weight"]
        assert weight.grad is None
        assert relative_error(student.grad, exact["student_hidden"]) <= 1e-4
    assert relative_error(accumulator, expected) <= 1e-4


def test_the_accumulator_refuses_another_upstream_gradient():
    given = peaked()
    student = given["student_hidden"].requires_grad_()
    out = fused_hsd_loss(
        **{**given, "student_hidden": student, "weight": given["weight"].requires_grad_()},
        weight_grad_out=torch.zeros(given["weight"].shape),
    )
    with pytest.raises(RuntimeError, match=r"weight_grad_out: found an upstream gradient of 2.0"):
        (2 * out.loss).backward()


@pytest.mark.parametrize("options", [{}, {"kl_temperature": 0.7}, {"logit_softcap": 30.0}])
def test_top_k_against_dense_logits(options):
    given = peaked() | {"top_k": 5, "temperature": 1.3} | options
    stats = fused_hsd_loss(**given).stats
    exact = cast(given, torch.float64)
    active = given["token_weights"] != 0

    def expected(hidden, temperature):
        logits = exact[hidden] @ exact["weight"].T + exact["bias"]
        if "logit_softcap" in options:
            logits = 30.0 * torch.tanh(logits / 30.0)
        return (logits / temperature).log_softmax(-1).topk(5, dim=-1)

    teacher_temperature = options.get("kl_temperature", 1.3)
    for prefix, wanted in (
        ("", expected("student_hidden", 1.3)),
        ("teacher_", expected("teacher_hidden", teacher_temperature)),
    ):
        ids, logprobs = (getattr(stats, f"{prefix}top_{kind}") for kind in ("ids", "logprobs"))
        assert torch.equal(ids[active], wanted.indices[active])
        assert relative_error(logprobs[active], wanted.values[active]) <= 1e-5
        assert (ids[~active] == -1).all()
        assert logprobs[~active].isnan().all()
