"""The whole loss on the Triton kernels, run by Triton's interpreter, against dense fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import (
    assert_matches,
    assert_same_statistics,
    cast,
    regime,
    relative_error,
    solve,
    truth,
)
from test_loss import CASES, TOLERANCE, problem

from hsd_kernels import fused_hsd_loss, fused_token_loss, plan

pytest.importorskip("triton")

# Those that select other code in the kernels, or in what is around them.
CHOSEN = (
    "forward_kl",
    "reverse_kl",
    "jsd scaled",
    "no targets",
    "own teacher, shared reference",
    "policy gradient, no teacher",
    "kl_temperature",
    "everything",
    "everything, own teacher",
)


@pytest.mark.gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CHOSEN)
def test_option(case, dtype):
    assert case in CASES
    arguments = problem(case, dtype)
    result = solve(arguments, backend="triton")
    assert result.plan.backend == "triton"
    expected = truth(arguments)
    assert_matches(result, expected, tolerance=TOLERANCE[dtype])
    assert_same_statistics(result.stats, expected.stats, tolerance=1e-3)  # of fp32 logits


@pytest.mark.gradient
@pytest.mark.parametrize(("kl", "entropy"), [(1e-4, 3.0), (1e-2, 0.1), (10.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contract(dtype, kl, entropy):
    arguments = cast(regime(kl, entropy), dtype)
    result, expected = solve(arguments, backend="triton"), truth(arguments)
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= TOLERANCE[dtype], name
    large = expected.stats.kl >= 1e-5
    assert relative_error(result.stats.kl[large], expected.stats.kl[large]) <= 1e-3


@pytest.mark.gradient
@pytest.mark.parametrize("case", ["forward_kl", "everything"])
def test_chunks_change_nothing(case):
    arguments = problem(case, torch.float32, lead=(24,))
    whole = solve(arguments, backend="triton")
    small = solve(arguments | {"max_chunk_bytes": 7 * 4 * 37 * 4}, backend="triton")
    assert small.plan.chunks > whole.plan.chunks
    assert_matches(small, whole, tolerance=1e-6)
    assert_matches(small, truth(arguments))


@pytest.mark.gradient
def test_chunks_sparse_and_top_k():
    arguments = problem("forward_kl", torch.float32, lead=(20,))
    options = {"max_chunk_bytes": 2 * 37 * 4 * 7, "sparse_tolerance": 1e-7, "top_k": 3}
    options["sparse_max_columns"] = 37
    result = solve(arguments | options, backend="triton")
    assert result.plan.chunks == 3
    with torch.no_grad():
        expected_ids = fused_hsd_loss(**arguments, top_k=3).stats.top_ids
    assert torch.equal(result.stats.top_ids, expected_ids)
    expected = truth(arguments)
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 1e-4, name


@pytest.mark.gradient
@pytest.mark.parametrize("options", [{}, {"sparse_tolerance": 1e-6, "sparse_max_columns": 37}])
def test_fp16_keeps_the_digits_of_small_weights(options):
    """A logit gradient in fp16 has none at the weights of a mean over some hundred thousand."""
    arguments = problem("everything", torch.float16)
    arguments["token_weights"] = arguments["token_weights"] * 1e-6
    arguments["max_chunk_bytes"] = 7 * 4 * 37 * 4  # several chunks of every set of sides
    scale = 2.0**20  # of the loss, as fp16 training has it: gradients of leaves are fp16 too
    result = solve(arguments | options, backend="triton", upstream=scale)
    expected = truth(arguments, upstream=scale)
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 5e-3, name
    active = arguments["token_weights"] != 0
    mass = solve(cast(arguments, torch.float32)).stats.gradient_mass
    assert relative_error(result.stats.gradient_mass[active], mass[active]) <= 5e-3


def test_fp16_adds_to_what_an_accumulator_holds():
    total, wanted = torch.zeros(37, 8), torch.zeros(37, 8, dtype=torch.float64)
    for seed in range(2):
        arguments = problem("forward_kl", torch.float16, seed=seed)
        arguments["token_weights"] = torch.full((12,), 1e-6)
        given = {"backend": "triton", "weight_grad_out": total}
        given["weight"] = arguments["weight"].requires_grad_()
        fused_hsd_loss(**arguments | given)  # the sum is formed during forward
        wanted += truth(arguments).gradients["weight"]
    assert relative_error(total, wanted) <= 5e-3


def test_a_loss_of_ones_own():
    arguments = problem("forward_kl", torch.float32)
    found = [
        fused_token_loss(
            **arguments, token_loss=lambda s, i: s["reverse_kl"] * s["entropy"], backend=backend
        ).loss
        for backend in ("triton", "cpu")
    ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_gpu_chunk_has_2048_rows_where_memory_allows():
    assert plan(8192, 4096, 151_936, backend="triton", narrow=True).rows_per_chunk == 2048
    assert (
        plan(8192, 4096, 151_936, backend="triton", narrow=True, max_chunk_bytes=2**30).chunks > 8
    )


def test_float64_and_cpu_tensors_without_the_interpreter_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend: found 'triton' with float64"):
        fused_hsd_loss(**problem("forward_kl", torch.float64), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend: found 'triton' with CPU tensors"):
        fused_hsd_loss(**problem("forward_kl"), backend="triton")
