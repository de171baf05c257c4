"""The whole loss on the Triton kernels, interpreted, against dense fp64 over a generated grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generated_losses import FULL, Case, cases
from hypothesis import HealthCheck, Phase, given, settings
from kernel_problems import (
    Arguments,
    Result,
    cast,
    relative_error,
    solve,
    truth,
)
from torch import Tensor

from hsd_kernels import reference

EXAMPLES = 600 if FULL else 40
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
VALUE, SMALLEST = 1e-3, 1e-5  # of KLs, relative, from so many nats on
DIFFERENCE = 1e-2  # gradients and KLs of logits that are held in bf16
ROUNDINGS = 4  # product, scale, softcap and temperature
MUTATIONS = (lambda g: g * 0, lambda g: g * 1.05, lambda g: g.roll(1, 0))


@contextmanager
def rounded_logits() -> Iterator[None]:
    """The dense reference from logits that went through fp32 once, on all sides."""
    exact = reference.dense_logits

    def rounded(*arguments: Any) -> Tensor:
        logits = exact(*arguments)
        return logits + (logits.float() - logits).detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "dense_logits", rounded)
        yield


def rounded_differences(given: Arguments) -> Arguments:
    """Sides whose differences to the student are what bf16 operands hold of them."""
    exact = cast(given, torch.float64)
    student = given["student_hidden"].float()
    for name in ("teacher_hidden", "ref_hidden"):
        if given.get(name) is not None:
            difference = (student - given[name].float()).bfloat16()
            exact[name] = exact["student_hidden"] - difference.double()
    return exact


def nearby_truth(given: Arguments, *, difference: bool, **options: Any) -> Result:
    """What rounding alone, which no kernel could undo, makes of the truth."""
    if difference:
        return truth(rounded_differences(given), **options)
    with rounded_logits():
        return truth(given, **options)


def loss_scale(dtype: torch.dtype, expected: Result) -> float:
    """As fp16 training finds it: a power of two by which no gradient of a parameter overflows."""
    if dtype is not torch.float16:
        return 1.0
    largest = max((g.abs().amax().item() for g in expected.gradients.values() if len(g)), default=0)
    return 2.0 ** min(12, math.floor(math.log2(2**15 / max(largest, 1e-30))))


def below_fp16(case: Case, name: str, upstream: float) -> float:
    """Norm of what a gradient loses of logit gradients too small for fp16, and by its own dtype.

    The largest is brought to 8 or more, so those below a 2^-27th of it are lost: a saturated
    softcap takes them there.
    """
    a = case.arguments
    if case.dtype is not torch.float16 or not len(a["student_hidden"]):
        return 0.0
    coefficients = [1.0, *(a[key] for key in ("kl_coef", "ref_coef", "pg_coef") if key in a)]
    beta = a.get("jsd_beta", 0.5)
    if a.get("jsd_convention") == "scaled" and 0 < beta < 1:
        coefficients.append(a.get("kl_coef", 1.0) / (beta * (1 - beta)))
    largest = a["token_weights"].abs().max().item() * max(map(abs, coefficients))
    vocab = a.get("vocab_size", len(a["weight"]))
    heads = a["weight"][:vocab]
    other = heads if name == "student_hidden" else a["student_hidden"]
    lost = abs(upstream) * largest * 2**-27 / 2 * (len(a["student_hidden"]) * vocab) ** 0.5
    own = 2**-25 * (heads.numel() + a["student_hidden"].numel()) ** 0.5
    spread: float = 1.0 if name == "bias" else other.double().norm().item()
    return lost * spread + own


def assert_gradient(found: Tensor, expected: Tensor, floor: float, tolerance: float) -> None:
    """By relative norm, beside an error that is not the kernels'."""
    size = expected.norm().item()
    allowed = tolerance * size + floor
    assert (found.double() - expected).norm().item() <= allowed
    if 0.02 * size <= allowed:
        return
    differ = relative_error(expected.roll(1, 0), expected) > 0.05
    for mutate in MUTATIONS[: 3 if differ else 2]:
        assert (mutate(found.double()) - expected).norm().item() > allowed


def assert_statistics(result: Result, expected: Result, nearby: Result) -> None:
    """KLs as the contract has them; of the others it says nothing, and rounding says enough."""
    difference = result.plan.precision == "difference"
    for name in ("kl", "ref_kl", "logprob", "entropy", "lse", "teacher_logprob", "teacher_entropy"):
        wanted, near = getattr(expected.stats, name), getattr(nearby.stats, name)
        found = getattr(result.stats, name)
        if wanted is None:
            assert found is None
            continue
        assert torch.equal(found.isnan(), wanted.isnan()), name
        known = ~wanted.isnan()
        if not known.any():
            continue
        found, wanted, near = found[known].double(), wanted[known], near[known]
        kl = name in ("kl", "ref_kl")
        if difference and kl:
            large = wanted >= SMALLEST
            allowed = DIFFERENCE * wanted[large].norm() + (near - wanted)[large].norm()
            assert (found - wanted)[large].norm() <= allowed, name
        elif difference:
            assert (found - wanted).square().mean().sqrt() <= DIFFERENCE * (1 + wanted.abs().max())
        elif kl:
            allowed = VALUE * wanted.abs().clamp(min=SMALLEST) + ROUNDINGS * (near - wanted).abs()
            assert ((found - wanted).abs() <= allowed).all(), name
        else:
            allowed = 1e-5 * (1 + wanted.abs()) + ROUNDINGS * (near - wanted).abs()
            assert ((found - wanted).abs() <= allowed).all(), name


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # to look for a smaller example takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(cases())
@pytest.mark.slow
@pytest.mark.timeout(0 if FULL else 900)
def test_generated_losses(case):
    ours = ("precision", "sparse_tolerance", "sparse_max_columns", "max_chunk_bytes")
    dense = {name: value for name, value in case.arguments.items() if name not in ours}
    expected = truth(dense, frozen=case.frozen, upstream=case.upstream)
    upstream = case.upstream * loss_scale(case.dtype, expected)
    options = {"frozen": case.frozen, "upstream": upstream}
    expected = truth(dense, **options)
    result = solve(case.arguments, backend="triton", **options)
    assert result.loss.isfinite() and result.gradients.keys() == expected.gradients.keys()
    difference = result.plan.precision == "difference"
    assert difference == ("precision" in case.arguments)
    nearby = nearby_truth(dense, difference=difference, **options)
    tolerance, times = (DIFFERENCE, 1) if difference else (GRADIENT[case.dtype], ROUNDINGS)
    for name, found in result.gradients.items():
        used = case.arguments.get("vocab_size", len(found))
        if name != "student_hidden":
            assert found[used:].count_nonzero() == 0
        if case.identical:
            assert found.count_nonzero() == 0, name
        else:
            wanted = expected.gradients[name]
            floor = times * (nearby.gradients[name] - wanted).norm().item()
            floor += below_fp16(case, name, upstream)
            assert_gradient(found, wanted, floor, tolerance)
    if case.identical:
        assert result.loss == 0
    assert_statistics(result, expected, nearby)
