"""The custom ops among torch's composable parts: opcheck, compile, checkpointing, functorch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from kernel_problems import Draw, cast, relative_error, truth
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hsd_kernels import fused_hsd_loss, fused_token_loss, register_token_loss, vocab_statistics
from hsd_kernels.arguments import check
from hsd_kernels.op_arguments import arguments_of

LEARNED = ("student_hidden", "weight", "bias")


def problem(count: int = 12, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draw = Draw((count,))
    given = draw.problem() | {"ref_hidden": draw.states(), "ref_coef": 0.1, "divergence": "jsd"}
    if count:
        given["token_weights"] = draw.masked()
    return cast(given, dtype)


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    return {name: given[name].detach().requires_grad_() for name in LEARNED}


@register_token_loss("test_ops.gated_kl")
def gated_kl(statistics, inputs):
    ratio = torch.exp(statistics["logprob"] - inputs["old_logprob"]).clamp(max=2.0)
    return ratio.detach() * torch.sigmoid(statistics["entropy"]) * statistics["forward_kl"]


def hsd(given: dict[str, Any]) -> Tensor:
    return fused_hsd_loss(**given).loss


def own(given: dict[str, Any]) -> Tensor:
    shared = {k: v for k, v in given.items() if k not in ("ref_coef", "divergence")}
    old = torch.full_like(given["token_weights"], -3.0) if "token_weights" in given else None
    if old is None:
        old = given["student_hidden"].new_zeros(given["student_hidden"].shape[:-1])
    return fused_token_loss(
        **shared, token_loss="test_ops.gated_kl", token_inputs={"old_logprob": old}
    ).loss


def coupled(given: dict[str, Any]) -> Tensor:
    names = ("student_hidden", "teacher_hidden", "weight", "bias", "targets")
    found = vocab_statistics(
        **{name: given[name] for name in names}, statistics=("forward_kl", "logprob", "entropy")
    )
    return found.forward_kl.sum() * found.logprob.exp().sum() - found.entropy.square().sum()


LOSSES = {"fused_hsd_loss": hsd, "fused_token_loss": own, "vocab_statistics": coupled}


def gradients(loss, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    own_leaves = leaves(given)
    value = loss({**given, **own_leaves})
    value.backward()
    return value.detach(), {name: leaf.grad for name, leaf in own_leaves.items()}


def default_arguments(given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(fused_hsd_loss).parameters
    return {n: None if p.default is p.empty else p.default for n, p in parameters.items()} | given


@pytest.mark.parametrize("op", ["solve", "statistics"])
@pytest.mark.parametrize("options", [{}, {"sparse_tolerance": 0.1, "top_k": 2}])
def test_opcheck(op, options):
    given = problem() | options
    arguments = arguments_of(check(default_arguments(given | leaves(given))))
    wants = dict.fromkeys(("want_student", "want_weight", "want_bias"), op == "solve")
    torch.library.opcheck(getattr(torch.ops.hsd_kernels, op).default, (), arguments | wants)


def test_opcheck_of_the_op_that_writes_an_accumulator():
    given = problem() | {"weight_grad_out": torch.zeros(37, 8)}
    arguments = arguments_of(check(default_arguments(given)))
    wants = {"want_student": True, "want_weight": True, "want_bias": True}
    torch.library.opcheck(torch.ops.hsd_kernels.solve_into.default, (), arguments | wants)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_a_graph_break_and_without_recompiling_over_n(name):
    torch._dynamo.reset()
    graphs = 0

    def counting(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counting)
    seen = []
    for count in (12, 7, 30, 19, 1, 0, 25):
        given = problem(count)
        expected, expected_gradients = gradients(LOSSES[name], given)
        found, found_gradients = gradients(compiled, given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for leaf, gradient in expected_gradients.items():
            torch.testing.assert_close(found_gradients[leaf], gradient, rtol=1e-6, atol=1e-9)
        seen.append(graphs)
    assert seen[1] <= 2
    assert seen[1] == seen[2] == seen[3]  # one recompilation after the first change of N
    assert seen[-1] <= 4  # and one each for N = 1 and N = 0


@pytest.mark.gradient
def test_compiled_gradients_are_those_of_the_dense_reference():
    given, expected = problem(), truth(problem()).gradients
    torch._dynamo.reset()
    found = gradients(torch.compile(hsd, fullgraph=True, backend="aot_eager"), given)[1]
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) <= 1e-4, name


@pytest.mark.gradient
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(reentrant):
    given = problem()
    own_leaves = leaves(given)

    def loss(student):
        return fused_hsd_loss(**{**given, **own_leaves, "student_hidden": student}).loss

    checkpoint(loss, own_leaves["student_hidden"], use_reentrant=reentrant).backward()
    expected = truth(given).gradients
    for name, leaf in own_leaves.items():
        assert relative_error(leaf.grad, expected[name]) <= 1e-4, name


@pytest.mark.gradient
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_that_is_kept_gives_its_gradients_again(compiled):
    given, expected = problem(), truth(problem()).gradients
    own_leaves = leaves(given)
    torch._dynamo.reset()
    loss = torch.compile(hsd, fullgraph=True, backend="aot_eager") if compiled else hsd
    value = loss({**given, **own_leaves})
    for factor, retain in ((2.0, True), (3.0, True), (5.0, False)):
        found = torch.autograd.grad(
            value, list(own_leaves.values()), torch.tensor(factor), retain_graph=retain
        )
        for name, gradient in zip(own_leaves, found, strict=True):
            assert relative_error(gradient, factor * expected[name]) <= 1e-4, name
            gradient.zero_()  # what a caller does to them is no matter of the graph


@pytest.mark.parametrize("name", [*LOSSES, "accumulator"])
def test_a_second_backward_through_a_freed_graph_is_refused(name):
    given = problem()
    if name == "accumulator":
        given["weight_grad_out"] = torch.zeros_like(given["weight"])
    value = LOSSES.get(name, hsd)({**given, **leaves(given)})
    value.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused(name):
    given = problem()
    own_leaves = leaves(given)
    found = torch.autograd.grad(
        LOSSES[name]({**given, **own_leaves}), list(own_leaves.values()), create_graph=True
    )
    for gradient in found:
        with pytest.raises(RuntimeError, match=r"second derivative.* expected backend='reference'"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp", "jacrev", "hessian"])
@pytest.mark.parametrize("name", LOSSES)
def test_functorch_is_refused(name, transform):
    given = problem()
    states = given["student_hidden"]

    def loss(student):
        return LOSSES[name]({**given, "student_hidden": student})

    with pytest.raises(RuntimeError):
        if transform == "vmap":
            torch.func.vmap(loss)(torch.stack([states] * 2))
        elif transform == "vjp":
            torch.func.vjp(loss, states)
        else:
            getattr(torch.func, transform)(loss)(states)


@pytest.mark.parametrize("name", ["student_hidden", "weight", "teacher_hidden", "token_weights"])
def test_forward_mode_is_refused_where_a_tangent_would_be_lost(name):
    """The ops pass on none, and a derivative of zero looks like an answer."""
    given = problem()
    given["token_weights"] = torch.ones(given["student_hidden"].shape[:-1])
    direction = torch.ones_like(given[name])

    def loss(value):
        return fused_hsd_loss(**{**given, name: value}).loss

    with pytest.raises(RuntimeError, match="found a forward-mode derivative"):
        torch.func.jvp(loss, (given[name],), (direction,))


def test_the_reference_has_forward_mode():
    given = cast(problem(), torch.float64)
    student = given["student_hidden"].requires_grad_()
    loss = fused_hsd_loss(**given).loss
    (gradient,) = torch.autograd.grad(loss, student)
    direction = Draw((12,), seed=1).states()

    def dense(value):
        return fused_hsd_loss(**{**given, "student_hidden": value}, backend="reference").loss

    _, found = torch.func.jvp(dense, (student.detach(),), (direction,))
    torch.testing.assert_close(found, (gradient * direction).sum())


def test_the_plan_of_a_compiled_call_says_what_ran():
    given = problem()
    expected = fused_hsd_loss(**given).plan

    def record(given):
        return fused_hsd_loss(**given)

    torch._dynamo.reset()
    compiled = torch.compile(record, fullgraph=True, backend="aot_eager")
    assert compiled(given).plan == expected
