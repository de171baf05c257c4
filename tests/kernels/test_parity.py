"""hsd_kernels.parity against dense fp64 in plain PyTorch, written from the papers' formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_problems import LEARNED, Arguments, Draw, cast, relative_error, truth
from test_memory import recorded
from torch import Tensor

from hsd_kernels import parity

DIVERGENCES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "jsd_beta": 0.3},
    {"divergence": "jsd", "jsd_beta": 0.3, "jsd_convention": "scaled"},
    {"divergence": "jsd", "jsd_beta": 0.3, "jsd_convention": "interior"},
    {"divergence": "jsd", "jsd_beta": 0.0},
    {"divergence": "jsd", "jsd_beta": 1.0, "jsd_convention": "scaled"},
]
NAMES = ["forward", "reverse", "gkd", "scaled", "interior", "gkd 0", "scaled 1"]
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=NAMES)
WEIGHTS = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
Loss = Callable[..., Tensor]


def problem(dtype: torch.dtype = torch.float64, **draw: Any) -> Arguments:
    given = Draw(**draw).problem(near=0.6)
    del given["targets"]
    return cast(given, dtype)


def gradients(loss: Loss, arguments: Arguments, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Values per token, and the gradients of a weighted sum of them."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in LEARNED}
    values = loss(**{**arguments, **leaves, **options})
    (values.flatten() * WEIGHTS).sum().backward()
    return values.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def probabilities(student_hidden, teacher_hidden, weight, bias, **_: Any) -> tuple[Tensor, Tensor]:
    p = torch.softmax(student_hidden @ weight.T + bias, -1)
    q = torch.softmax(teacher_hidden @ weight.detach().T + bias.detach(), -1)
    return p, q


def shares(
    p: Tensor,
    q: Tensor,
    *,
    divergence: str,
    jsd_beta: float = 0.5,
    jsd_convention: str = "gkd",
) -> Tensor:
    """Each entry's share of the divergence: GKD, arXiv 2306.13649, equations 1 and 2."""
    if divergence == "forward_kl" or jsd_beta == 0:
        return q * (q / p).log()
    if divergence == "reverse_kl" or jsd_beta == 1:
        return p * (p / q).log()
    m = jsd_beta * q + (1 - jsd_beta) * p
    jsd = jsd_beta * q * (q / m).log() + (1 - jsd_beta) * p * (p / m).log()
    return jsd / (jsd_beta * (1 - jsd_beta)) if jsd_convention == "scaled" else jsd


def dense_top_k(*, ids: Tensor, tail: bool = True, divergence: dict, **given: Any) -> Tensor:
    """SDPO, arXiv 2601.20802: the top-K entries, and one entry for the mass outside of them."""
    p, q = (whole.gather(-1, ids) for whole in probabilities(**given))
    if tail:
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))
    else:
        p, q = (part / part.sum(-1, keepdim=True) for part in (p, q))
    return shares(p, q, **divergence).sum(-1)


def dense_clipped(*, clip: float, divergence: dict, **given: Any) -> Tensor:
    """OPSD, arXiv 2601.18734: each entry's share is cut at the clip, then they are summed."""
    return shares(*probabilities(**given), **divergence).clamp(max=clip).sum(-1)


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance
) -> None:
    values, wanted = found[0].double(), expected[0].double()
    torch.testing.assert_close(values, wanted, rtol=tolerance, atol=tolerance / 10)
    for name, gradient in expected[1].items():
        assert relative_error(found[1][name], gradient) <= tolerance, name


def ids_by(side: str, given: Arguments, k: int) -> Tensor:
    p, q = probabilities(**given)
    return (p if side == "student" else q).topk(k).indices


@pytest.mark.gradient
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["student", "teacher", "given"])
@each_divergence
def test_top_k_with_a_tail_bucket(divergence, support, dtype):
    arguments = problem(dtype)
    exact = cast(arguments, torch.float64)
    if support == "given":
        ids = torch.stack([torch.randperm(37, generator=torch.Generator())[:5]] * 12)
        options: dict = {"support": ids}
    else:
        ids, options = ids_by(support, exact, 5), {"support": support, "k": 5}
    found = gradients(parity.top_k_divergence, arguments, **options, **divergence)
    expected = gradients(dense_top_k, exact, ids=ids, divergence=divergence)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-3}[dtype]
    assert_same(found, expected, tolerance)


@pytest.mark.gradient
@each_divergence
def test_renormalised_top_k(divergence):
    arguments = problem()
    found = gradients(
        parity.top_k_divergence, arguments, support="teacher", k=5, tail_bucket=False, **divergence
    )
    ids = ids_by("teacher", arguments, 5)
    expected = gradients(dense_top_k, arguments, ids=ids, tail=False, divergence=divergence)
    assert_same(found, expected, 1e-9)


@pytest.mark.gradient
@pytest.mark.parametrize("tail_bucket", [True, False])
@each_divergence
def test_the_whole_vocabulary_is_the_full_divergence(divergence, tail_bucket):
    arguments = problem()
    found = gradients(
        parity.top_k_divergence,
        arguments,
        support="teacher",
        k=37,
        tail_bucket=tail_bucket,
        **divergence,
    )
    full = truth({**arguments, **divergence, "token_weights": WEIGHTS})
    assert_same(found, (full.stats.kl, full.gradients), 1e-9)


@pytest.mark.gradient
@each_divergence
def test_without_a_clip_the_full_divergence_is_that_of_the_dense_reference(divergence):
    arguments = problem()
    found = gradients(parity.full_divergence, arguments, **divergence)
    full = truth({**arguments, **divergence, "token_weights": WEIGHTS})
    assert_same(found, (full.stats.kl, full.gradients), 1e-9)


@pytest.mark.gradient
@pytest.mark.parametrize("clip", [0.002, 0.05])
@each_divergence
def test_pointwise_clip(divergence, clip):
    arguments = problem()
    found = gradients(parity.full_divergence, arguments, pointwise_clip=clip, **divergence)
    expected = gradients(dense_clipped, arguments, clip=clip, divergence=divergence)
    assert_same(found, expected, 1e-9)
    unclipped = parity.full_divergence(**arguments, **divergence)
    assert (unclipped - found[0] > 1e-4).any()  # the clip cuts something off


@pytest.mark.parametrize("tail_bucket", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_top_k_is_that_of_trls_sdpo(alpha, tail_bucket):
    losses = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    given = problem()
    logits = given["student_hidden"] @ given["weight"].T + given["bias"]
    other = given["teacher_hidden"] @ given["weight"].T + given["bias"]
    theirs = losses.compute_topk_self_distillation_loss(
        logits,
        other,
        distillation_topk=5,
        distillation_alpha=alpha,
        distillation_add_tail=tail_bucket,
    )
    options = {"divergence": "jsd", "jsd_beta": alpha, "tail_bucket": tail_bucket}
    torch.testing.assert_close(parity.top_k_divergence(**given, k=5, **options), theirs)


def test_the_tail_bucket_bounds_the_divergence_and_without_it_a_student_looks_right():
    """The student's top 4 agree with the teacher's in proportion, and hold 40 % of its mass."""
    q = torch.tensor([[0.24, 0.24, 0.24, 0.24, 0.01, 0.01, 0.01, 0.01]], dtype=torch.float64)
    p = torch.tensor([[0.10, 0.10, 0.10, 0.10, 0.15, 0.15, 0.15, 0.15]], dtype=torch.float64)
    full = shares(p, q, divergence="forward_kl").sum()

    def top_k(**options: Any) -> tuple[Tensor, Tensor]:
        student = p.log().requires_grad_()  # under an identity head, hidden states are logits
        ids = torch.arange(4)[None]
        identity = torch.eye(8, dtype=torch.float64)
        value = parity.top_k_divergence(student, q.log(), identity, support=ids, **options)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), gradient

    value, gradient = top_k()
    assert full.item() == pytest.approx(0.7321, abs=1e-4)
    assert value.item() == pytest.approx(full.item(), rel=1e-9)  # the rest is in proportion too
    torch.testing.assert_close(gradient, p - q)
    value, gradient = top_k(tail_bucket=False)
    assert abs(value.item()) < 1e-12  # the whole divergence is missed
    assert gradient.abs().max() < 1e-12


def test_the_tail_bucket_keeps_a_lower_bound_that_grows_with_k():
    arguments = problem()
    full = parity.full_divergence(**arguments)
    found = [parity.top_k_divergence(**arguments, k=k) for k in (1, 4, 16, 37)]
    for smaller, larger in itertools.pairwise(found):
        assert (smaller <= larger + 1e-12).all()
    assert (found[0] < 0.9 * full).any()
    torch.testing.assert_close(found[-1], full)


def test_a_small_tail_keeps_its_digits():
    """1 minus the sum of the top entries is 0 here in fp32."""
    teacher, ids, identity = [[20.0, 0.0, 1.0, 2.0]], torch.tensor([[0]]), torch.eye(4)

    def gradient(dtype: torch.dtype) -> Tensor:
        student = torch.tensor([[20.0, 0.0, 0.0, -1.0]], dtype=dtype, requires_grad=True)
        other, head = torch.tensor(teacher, dtype=dtype), identity.to(dtype)
        parity.top_k_divergence(student, other, head, support=ids).sum().backward()
        return student.grad

    assert gradient(torch.float64)[0, 1].item() == pytest.approx(-8e-9, rel=0.05)
    assert relative_error(gradient(torch.float32)[:, 1:], gradient(torch.float64)[:, 1:]) < 1e-4


def test_the_clip_turns_the_gradient_round_at_a_divergence_token():
    """The numbers of `full_divergence`'s docstring: the teacher wants entry 0 at .9, it has .01."""
    q = torch.tensor([[0.9, 0.06, 0.04]], dtype=torch.float64)
    p = torch.tensor([[0.01, 0.59, 0.40]], dtype=torch.float64)

    def gradient(**options: Any) -> Tensor:
        student = p.log().requires_grad_()
        identity = torch.eye(3, dtype=torch.float64)
        value = parity.full_divergence(student, q.log(), identity, **options)
        return torch.autograd.grad(value.sum(), student)[0][0]

    assert gradient()[0].item() == pytest.approx(-0.89)  # descent raises the entry
    assert gradient(pointwise_clip=0.05)[0].item() == pytest.approx(+0.001)  # lowers it
    torch.testing.assert_close(gradient(pointwise_clip=100.0), gradient())


@pytest.mark.gradient
def test_head_options_leading_shape_and_chunks():
    options = {"logit_scale": 0.8, "logit_softcap": 4.0, "temperature": 0.7, "vocab_size": 30}
    arguments = problem(lead=(3, 4)) | options
    full = truth({**arguments, "token_weights": WEIGHTS.reshape(3, 4)})
    for loss, also in (
        (parity.full_divergence, {}),
        (parity.top_k_divergence, {"k": 30}),
    ):
        found = gradients(loss, arguments, max_chunk_bytes=17 * 30 * 8 + 1, **also)
        assert found[0].shape == (3, 4)
        assert_same(found, (full.stats.kl, full.gradients), 1e-9)


def test_a_teacher_with_a_head_of_its_own():
    draw = Draw()
    own = {"teacher_hidden": draw.states(5), "teacher_weight": draw.head(5)}
    arguments = {**problem(), **own, "teacher_bias": draw.normal(37)}
    full = truth(arguments)
    for found in (
        parity.full_divergence(**arguments),
        parity.top_k_divergence(**arguments, support="teacher", k=37),
    ):
        torch.testing.assert_close(found, full.stats.kl)


@pytest.mark.gradient
def test_narrow_heads_add_up_over_chunks_in_fp32():
    arguments = problem(torch.bfloat16)
    found = gradients(parity.full_divergence, arguments, max_chunk_bytes=17 * 37 * 4)
    exact = truth({**arguments, "token_weights": WEIGHTS.float()})
    assert_same(found, (exact.stats.kl, exact.gradients), 5e-3)


def test_no_rows():
    arguments = problem(lead=(0,))
    student = arguments.pop("student_hidden").requires_grad_()
    for loss, options in ((parity.full_divergence, {}), (parity.top_k_divergence, {"k": 2})):
        values = loss(student_hidden=student, **arguments, **options)
        assert values.shape == (0,)
        values.sum().backward()


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (parity.top_k_divergence, {"k": 8}),
        (parity.top_k_divergence, {"k": 8, "support": "teacher", "divergence": "jsd"}),
        (parity.full_divergence, {"pointwise_clip": 0.05}),
        (parity.full_divergence, {"divergence": "jsd"}),
    ],
    ids=["top-k", "top-k jsd", "clipped", "full jsd"],
)
def test_memory_is_that_of_a_chunk(loss, options):
    rows, vocab, chunk_bytes = 512, 1000, 17 * 1000 * 4 * 40
    arguments = problem(torch.float32, lead=(rows,), hidden=4, vocab=vocab)
    leaves = {name: arguments[name].requires_grad_() for name in LEARNED}
    with recorded() as allocations:
        loss(**arguments | leaves, **options, max_chunk_bytes=chunk_bytes).sum().backward()
    assert allocations.largest < rows * vocab * 4 / 2
    assert chunk_bytes / 2 < allocations.peak <= 1.1 * chunk_bytes


IDS = torch.zeros((12, 1), dtype=torch.int64)
BAD = {
    "no k": ({}, "k: found None, expected an int from 1 to 37"),
    "k of 0": ({"k": 0}, "k: found 0"),
    "k above V": ({"k": 38}, "k: found 38"),
    "k is a bool": ({"k": True}, "k: found True"),
    "k beside ids": ({"support": IDS, "k": 1}, "k: found 1, expected None"),
    "unknown support": ({"support": "both", "k": 1}, "support: found 'both'"),
    "shape": ({"support": IDS[:11]}, r"support: found shape \(11, 1\), expected \(12,\) \+ \(K,\)"),
    "no ids": ({"support": IDS[:, :0]}, r"support: found shape \(12, 0\)"),
    "outside": ({"support": IDS + 37}, "support: found 37, expected 0 to 36"),
    "negative": ({"support": IDS - 1}, "support: found -1"),
    "twice": ({"support": IDS.expand(-1, 2) + 3}, "support: found 3 twice"),
    "dtype": ({"support": IDS.int()}, "support: found torch.int32"),
    "list": ({"support": [[0]] * 12}, "support: found list, expected a tensor"),
    "teacher": ({"teacher_hidden": None, "k": 1}, "teacher_hidden: found None"),
    "chunk": ({"k": 1, "max_chunk_bytes": 8}, "max_chunk_bytes: found 8, expected at least"),
    "beta": ({"k": 1, "divergence": "jsd", "jsd_beta": 2}, "jsd_beta: found 2"),
    "interior": (
        {"k": 1, "divergence": "jsd", "jsd_beta": 0, "jsd_convention": "interior"},
        "jsd_beta: found 0.0",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_of_top_k(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parity.top_k_divergence(**{**problem(torch.float32), **options})


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="pointwise_clip: found"):
        parity.full_divergence(**problem(torch.float32), pointwise_clip=clip)
