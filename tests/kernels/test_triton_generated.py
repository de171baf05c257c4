"""The whole loss on the Triton kernels, interpreted, against dense fp64 over a generated grid."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_problems import (
    Arguments,
    Draw,
    Result,
    cast,
    likely_token,
    relative_error,
    scale_and_height,
    solve,
    step,
    truth,
)
from torch import Tensor
from torch.nn.functional import pad

from hsd_kernels import reference

FULL = bool(os.environ.get("HSD_FULL_GRID"))  # make test-kernels
EXAMPLES = 600 if FULL else 40
# Rows are interpreted one after the other: 300 take as long as six times 48.
MOST_ROWS = (48, 48, 48, 48, 48, 48, 48, 300) if FULL else (48,)
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 5e-3}
VALUE, SMALLEST = 1e-3, 1e-5  # of KLs, relative, from so many nats on
DIFFERENCE = 1e-2  # gradients and KLs of logits that are held in bf16
ROUNDINGS = 4  # product, scale, softcap and temperature
KINDS = ("ordinary", "one offset", "both offset", "identical", "one-hot", "wide")
MUTATIONS = (lambda g: g * 0, lambda g: g * 1.05, lambda g: g.roll(1, 0))


@dataclass(frozen=True)
class Case:
    """A call of `fused_hsd_loss` in its dtype, and whether its sides are the same."""

    arguments: Arguments
    frozen: tuple[str, ...]
    upstream: float
    identical: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["student_hidden"].dtype


def sides(
    kind: str, tokens: Draw, *, kl: float, entropy: float, offset: float
) -> dict[str, Tensor]:
    """fp64 states of three sides and their head.

    Two coordinates serve one purpose each: the first raises the likely token, the second all logits
    by `offset`.
    """
    count, noisy = tokens.lead[0], tokens.hidden - 2
    weight = tokens.normal(tokens.vocab, tokens.hidden) / noisy**0.5
    weight[:, 0], weight[:, 1] = likely_token(weight[:, 0]), 1
    student, *others = (tokens.states() for _ in range(3))
    for states in (student, *others):
        states[:, :2] = 0
    if kind == "wide":  # logits to +-80
        found = [80 * s / (s @ weight.T).abs().amax(-1, keepdim=True) for s in (student, *others)]
    else:
        reachable = min(entropy, 0.7 * math.log(tokens.vocab))
        scale, height = scale_and_height(reachable, student @ weight.T)
        student = scale * student
        student[:, :1] = height
        found = [student]
        for direction in others:
            size = 0 if kind == "identical" else step(kl, student @ weight.T, direction @ weight.T)
            found.append(student + size * direction)
        if kind == "one-hot":  # the teacher is sure
            found[1] = torch.zeros(count, tokens.hidden, dtype=torch.float64)
            found[1][:, 0] = 60
        found[0][:, 1] = offset if kind in ("one offset", "both offset") else 0
        for other in found[1:]:
            other[:, 1] = offset if kind == "both offset" else 0
    names = ("student_hidden", "teacher_hidden", "ref_hidden")
    return dict(zip(names, found, strict=True)) | {"weight": weight}


def weights(draw: st.DrawFn, tokens: Draw) -> Tensor:
    """Positive, or some of them exactly zero, or all."""
    keep = draw(st.sampled_from([1.0, 1.0, 0.6, 0.6, 0.6, 0.6, 0.1, 0.0]))
    return tokens.per_token(0.2, 1) * (tokens.per_token() < keep)


def divergence(draw: st.DrawFn) -> Arguments:
    name = draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"]))
    if name != "jsd":
        return {"divergence": name}
    beta = draw(st.sampled_from([0.0, 1e-3, 0.3, 0.5, 1 - 1e-3, 1.0]))
    conventions = ["gkd", "scaled"] + ["interior"] * (0 < beta < 1)
    return {
        "divergence": name,
        "jsd_beta": beta,
        "jsd_convention": draw(st.sampled_from(conventions)),
    }


def head_options(draw: st.DrawFn, tokens: Draw, *, identical: bool, difference: bool) -> Arguments:
    """What becomes of products with the head on their way to log-probs."""
    given: Arguments = {}
    if not difference and draw(st.booleans()):
        given["bias"] = tokens.normal(tokens.vocab)
    if draw(st.booleans()):
        given["logit_scale"] = draw(st.sampled_from([0.5, -0.8, 1.25]))
    if not difference and draw(st.booleans()):
        given["logit_softcap"] = draw(st.sampled_from([4.0, 30.0]))
    names = ["temperature"] + ["kl_temperature"] * (not difference)
    names += ["teacher_temperature"] * (not difference and not identical)
    for name in names:
        kind = draw(st.sampled_from(["absent", "absent", "number", "per token"]))
        if kind != "absent":
            given[name] = 0.7 if kind == "number" else tokens.per_token(0.5, 2)
    return given


def own_heads(draw: st.DrawFn, given: Arguments) -> Arguments:
    """Heads of other models: more dimensions, more rows."""
    own: Arguments = {}
    for name in ("teacher", "ref"):
        if f"{name}_hidden" in given and draw(st.integers(0, 3)) == 0:
            own[f"{name}_hidden"] = pad(given[f"{name}_hidden"], (0, 2), value=0.5)
            own[f"{name}_weight"] = pad(given["weight"], (0, 2, 0, 3), value=0.5)
    return own


def terms(draw: st.DrawFn, tokens: Draw) -> Arguments:
    """Terms beside the divergence, and factors of single terms."""
    given: Arguments = {}
    if draw(st.booleans()):
        given |= {
            "advantages": tokens.per_token(-1, 1),
            "old_logprobs": tokens.per_token(-0.5, 0.5),
        }
        given |= {"pg_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        given["entropy_coef"] = draw(st.sampled_from([0.1, -0.1]))
    return given


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = draw(st.one_of(st.integers(2, 300), st.sampled_from([1023, 2049, 4097, 5000])))
    most = draw(st.sampled_from(MOST_ROWS))
    rows = draw(st.integers(0, most if columns <= 300 else most // 6))
    hidden = draw(st.sampled_from([3, 5, 9, 17, 33]))
    tokens = Draw((rows,), hidden, columns, seed=draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(KINDS))
    given = sides(
        kind,
        tokens,
        kl=10 ** draw(st.floats(-4, 1)),
        entropy=draw(st.floats(0.1, 8)),
        offset=draw(st.sampled_from([-40.0, 40.0])),
    )
    present = draw(st.sampled_from([("teacher",), ("teacher", "ref"), ("ref",)]))
    for name in {"teacher", "ref"} - set(present):
        del given[f"{name}_hidden"]
    identical = kind == "identical"
    dtype = draw(st.sampled_from(list(GRADIENT)))
    difference = dtype == torch.bfloat16 and draw(st.booleans())
    given |= {"precision": "difference"} if difference else {}
    given |= {} if identical or difference else own_heads(draw, given)
    given |= head_options(draw, tokens, identical=identical, difference=difference)
    if draw(st.booleans()):
        given["targets"] = tokens.targets()
        given |= {} if identical else terms(draw, tokens)
    given["token_weights"] = weights(draw, tokens) / max(rows, 1)
    if "teacher" in present:
        given |= divergence(draw)
        given |= {"kl_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
        given |= {"token_kl_cap": 0.5} if draw(st.booleans()) else {}
    else:
        given |= {"teacher_hidden": None}
        given.pop("teacher_temperature", None)
    if "ref" in present:
        given["ref_coef"] = draw(st.sampled_from([0.3, 0.001]))
        given |= {"ref_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        given = padded(given, draw(st.integers(1, 9)))
    if draw(st.booleans()):
        given |= {"sparse_tolerance": 1e-6, "sparse_max_columns": columns}
    if draw(st.booleans()):  # nine rows a chunk or more: of three sides and two gradients
        given["max_chunk_bytes"] = 9 * 5 * 4 * columns
    frozen = draw(st.sampled_from([(), (), (), ("weight", "bias"), ("student_hidden",)]))
    upstream = draw(st.sampled_from([1.0, -3.0]))
    return Case(near_the_policy(cast(given, dtype)), frozen, upstream, identical)


def near_the_policy(given: Arguments) -> Arguments:
    """`old_logprobs` are drawn as distances to the policy's log-probs."""
    if "old_logprobs" not in given:
        return given
    names = ("student_hidden", "weight", "bias", "targets", "token_weights", "vocab_size")
    names += ("temperature", "logit_scale", "logit_softcap")
    policy = {name: given[name] for name in names if name in given}
    logprob = truth(policy | {"teacher_hidden": None, "entropy_coef": 1.0}).stats.logprob
    return given | {"old_logprobs": given["old_logprobs"] + logprob.nan_to_num().float()}


def padded(given: Arguments, rows: int) -> Arguments:
    """The same, with rows of the head that must not matter."""
    columns = len(given["weight"])
    worthless = torch.full((rows, given["weight"].shape[1]), 1e30, dtype=torch.float64)
    worthless[0] = torch.nan
    longer = {
        name: torch.cat([given[name], worthless if name == "weight" else worthless[:, 0]])
        for name in ("weight", "bias")
        if name in given
    }
    return given | longer | {"vocab_size": columns}


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
