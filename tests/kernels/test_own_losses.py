"""fused_token_loss and vocab_statistics against dense autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_problems import Draw, cast, relative_error
from torch import Tensor

from hsd_kernels import fused_token_loss, register_token_loss, vocab_statistics
from hsd_kernels.statistics import DIFFERENTIABLE, STATISTICS

LEARNED = ("student_hidden", "weight", "bias")
HEADS = {"one head": False, "own heads": True}


def problem(*, own_heads: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = Draw((3, 4))
    given = draw.problem() | {"ref_hidden": draw.states()}
    if own_heads:
        given |= {"teacher_weight": draw.head(), "ref_weight": draw.head()}
    return cast(given, dtype)


def dense_statistics(given: dict[str, Any], leaf: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written out once more: log-softmaxes of dense logits, autograd through the student's."""

    def log_softmax(name: str) -> Tensor:
        if name == "student":
            return (leaf["student_hidden"] @ leaf["weight"].T + leaf["bias"]).log_softmax(-1)
        own = given.get(f"{name}_weight")
        weight = leaf["weight"].detach() if own is None else own
        logits = given[f"{name}_hidden"] @ weight.T
        return (logits if own is not None else logits + leaf["bias"].detach()).log_softmax(-1)

    p, q, r = (log_softmax(name) for name in ("student", "teacher", "ref"))
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0).double())

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    y = given["targets"][..., None]
    return {
        "logprob": p.gather(-1, y).squeeze(-1),
        "entropy": -(p.exp() * p).sum(-1),
        "forward_kl": kl(q, p),
        "reverse_kl": kl(p, q),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "ref_kl": kl(p, r),
        "teacher_logprob": q.gather(-1, y).squeeze(-1),
        "teacher_entropy": -(q.exp() * q).sum(-1),
        "top1_agree": (p.argmax(-1) == q.argmax(-1)).to(p.dtype),
    }


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: given[name].detach().clone().requires_grad_() for name in LEARNED}


def importance_weighted(statistics, inputs):
    """An importance-weighted, entropy-gated mixture of what there is."""
    ratio = torch.exp(statistics["logprob"] - inputs["old_logprob"]).clamp(max=2.0)
    gate = torch.sigmoid(statistics["entropy"] - inputs["threshold"])
    gap = torch.tanh(statistics["teacher_logprob"] - statistics["logprob"])
    return (
        ratio * gate * statistics["forward_kl"]
        + 0.3 * statistics["jsd"] * statistics["reverse_kl"]
        + 0.1 * statistics["ref_kl"] * statistics["teacher_entropy"]
        - gap * statistics["top1_agree"]
    )


@pytest.mark.gradient
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("own_heads", HEADS.values(), ids=HEADS)
def test_a_loss_of_ones_own(own_heads, backend):
    given, exact = problem(own_heads=own_heads), problem(own_heads=own_heads, dtype=torch.float64)
    draw = Draw((3, 4), seed=1)
    inputs = {"old_logprob": draw.per_token(-6, -2), "threshold": draw.per_token(1, 3)}
    weights = draw.masked()

    dense = leaves(exact)
    statistics = dense_statistics(exact, dense)
    expected = (weights * importance_weighted(statistics, inputs)).sum()
    expected.backward()

    own = leaves(given)
    out = fused_token_loss(
        **{**given, **own},
        token_loss=importance_weighted,
        token_inputs={name: value.float() for name, value in inputs.items()},
        token_weights=weights.float(),
        backend=backend,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-4, atol=1e-6)
    for name in LEARNED:
        assert relative_error(own[name].grad, dense[name].grad) <= 1e-4, name
    active = weights != 0
    assert relative_error(out.stats.jsd[active], statistics["jsd"][active]) <= 1e-4
    assert out.stats.jsd[~active].isnan().all()
    assert out.stats.kl is None


def gated_kl(statistics, inputs):
    """The README's."""
    ratio = torch.exp(statistics["logprob"] - inputs["old_logprob"]).clamp(max=2.0)
    return ratio.detach() * torch.sigmoid(statistics["entropy"]) * statistics["forward_kl"]


@pytest.mark.gradient
def test_the_gated_kl_of_the_readme():
    given, exact = problem(), problem(dtype=torch.float64)
    old = Draw((3, 4), seed=1).per_token(-6, -2)
    dense = leaves(exact)
    gated_kl(dense_statistics(exact, dense), {"old_logprob": old}).mean().backward()
    own = leaves(given)
    out = fused_token_loss(
        **{**given, **own}, token_loss=gated_kl, token_inputs={"old_logprob": old.float()}
    )
    out.loss.backward()
    for name in LEARNED:
        assert relative_error(own[name].grad, dense[name].grad) <= 1e-4, name


@pytest.mark.gradient
@pytest.mark.parametrize("own_heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
def test_statistics_for_a_loss_that_couples_tokens(masked, own_heads):
    given, exact = problem(own_heads=own_heads), problem(own_heads=own_heads, dtype=torch.float64)
    mask = Draw((3, 4), seed=1).per_token() < 0.6 if masked else None
    names = tuple(name for name in STATISTICS if name not in ("lse", "teacher_lse"))

    def loss(statistics: dict[str, Tensor]) -> Tensor:
        kept = {n: v if mask is None else v * mask for n, v in statistics.items()}
        sequence = kept["logprob"].sum(-1).exp() * kept["forward_kl"].sum(-1)
        return (
            sequence.sum()
            + kept["reverse_kl"].square().sum()
            + kept["jsd"].sum() * kept["ref_kl"].sum()
            - kept["entropy"].sum().square() * kept["teacher_logprob"].mean()
        )

    dense = leaves(exact)
    wanted = dense_statistics(exact, dense)
    loss(wanted).backward()
    own = leaves(given)
    found = vocab_statistics(**{**given, **own}, statistics=names, row_mask=mask)
    loss({name: getattr(found, name) for name in names}).backward()
    for name in LEARNED:
        assert relative_error(own[name].grad, dense[name].grad) <= 1e-4, name
    for name in names:
        value = getattr(found, name)
        expected = wanted[name] if mask is None else wanted[name] * mask
        assert relative_error(value, expected) <= 1e-4, name
        assert value.requires_grad == (name in DIFFERENTIABLE)


@pytest.mark.gradient
def test_the_backward_of_statistics_can_be_sparse():
    given = problem()
    own = leaves(given)
    arguments = {**given, **own, "ref_hidden": None}
    found = vocab_statistics(**arguments, sparse_tolerance=1e-6, sparse_max_columns=37)
    found.forward_kl.sum().backward()
    dense = leaves(problem(dtype=torch.float64))
    dense_statistics(problem(dtype=torch.float64), dense)["forward_kl"].sum().backward()
    for name in LEARNED:
        assert relative_error(own[name].grad, dense[name].grad) <= 1e-4


def test_without_grad_it_costs_two_gemms():
    given = problem()
    with torch.no_grad():
        out = fused_token_loss(**given, token_loss=lambda s, i: s["forward_kl"])
    assert out.plan.gemms == 3  # student, teacher, and the reference that was given
    assert not out.loss.requires_grad


def test_a_name_that_was_not_asked_for():
    found = vocab_statistics(**problem(), statistics=("entropy",))
    with pytest.raises(AttributeError, match="forward_kl: not among"):
        _ = found.forward_kl


REFUSED = {
    "an unknown name": ({"token_loss": "nothing"}, ValueError, "token_loss: found 'nothing'"),
    "no function": ({"token_loss": 3}, TypeError, "token_loss: found int"),
    "inputs without names": (
        {"token_loss": lambda s, i: s["lse"], "token_inputs": [1]},
        TypeError,
        "token_inputs: found list",
    ),
    "an unknown statistic": (
        {"token_loss": lambda s, i: s["perplexity"]},
        ValueError,
        "reads 'perplexity'",
    ),
    "a missing input": ({"token_loss": lambda s, i: i["beta"]}, ValueError, "reads 'beta'"),
    "a sum": ({"token_loss": lambda s, i: s["lse"].sum()}, ValueError, r"found \(\)"),
    "targets missing": (
        {"token_loss": lambda s, i: s["logprob"], "targets": None},
        ValueError,
        "reads 'logprob'",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_token_loss_that_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        fused_token_loss(**{**problem(), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ("perplexity",)}, "statistics: found 'perplexity'"),
        ({"statistics": "entropy"}, "statistics: found 'entropy', expected a sequence"),
        ({"statistics": ("logprob",), "targets": None}, "statistics: found 'logprob'"),
        ({"jsd_beta": 0.0}, "jsd_beta: found 0.0"),
        ({"row_mask": torch.ones(3, dtype=torch.bool)}, r"row_mask: found shape \(3,\)"),
    ],
)
def test_statistics_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        vocab_statistics(**{**problem(), **options})


def test_a_registered_name_is_taken_once():
    @register_token_loss("test_own_losses.entropy")
    def entropy(statistics, inputs):
        return statistics["entropy"]

    with pytest.raises(ValueError, match="registered"):
        register_token_loss("test_own_losses.entropy")(lambda s, i: s["lse"])
    with pytest.raises(ValueError, match="name: found 'hsd', which is the library's"):
        register_token_loss("hsd")(entropy)
    with pytest.raises(TypeError, match="name: found ''"):
        register_token_loss("")
    with pytest.raises(TypeError, match="loss: found int"):
        register_token_loss("test_own_losses.number")(3)
    out = fused_token_loss(**problem(), token_loss="test_own_losses.entropy")
    torch.testing.assert_close(out.loss, out.stats.entropy.mean())
