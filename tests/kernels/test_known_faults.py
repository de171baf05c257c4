"""What losses of this kind are known to get wrong, one test each, on the CPU and in Triton.

Elsewhere: offsets beyond 2^31 elements (test_triton_launch.py), top-k without a tail bucket and the
clip of single entries (test_parity.py), a tied head that a wrapper unties (tests/hsd/multiprocess).
"""

from __future__ import annotations

import pytest
import torch
from kernel_problems import Draw, assert_matches, relative_error, solve, truth
from test_loss import learned, problem

from hsd_kernels import fused_hsd_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("backend", ["cpu", "triton"])


@pytest.mark.gradient
def test_rows_of_a_padded_vocabulary_do_not_count(backend):
    used = problem("forward_kl")
    padding = torch.full((5, 8), torch.nan)
    longer = {
        "weight": torch.cat([used["weight"], padding]),
        "bias": torch.cat([used["bias"], padding[:, 0]]),
    }
    result = solve(used | longer | {"vocab_size": 37}, backend=backend)
    for name in longer:
        assert result.gradients[name][37:].count_nonzero() == 0
        result.gradients[name] = result.gradients[name][:37]
    assert_matches(result, truth(used))


@pytest.mark.gradient
@pytest.mark.parametrize(
    "option", [{"logit_softcap": 1.5}, {"logit_scale": 0.6}, {"temperature": 0.7}, {"bias": None}]
)
def test_softcap_scale_temperature_and_bias_count(backend, option):
    given = problem("forward_kl")
    result, expected = solve(given | option, backend=backend), truth(given | option)
    assert_matches(result, expected)
    without = truth(given).gradients["student_hidden"]
    assert relative_error(without, expected.gradients["student_hidden"]) > 0.01


@pytest.mark.gradient
def test_ignored_targets_are_left_out_and_are_refused_where_they_would_count(backend):
    given = problem("policy gradient")
    ignored = torch.arange(12) % 3 == 0
    given["targets"] = given["targets"].masked_fill(ignored, -100)
    with pytest.raises(ValueError, match="targets: found -100 at token 0"):
        solve(given, backend=backend)
    given["token_weights"] = torch.where(ignored, 0.0, 1 / 8)
    rest = {
        name: value[~ignored] if isinstance(value, torch.Tensor) and len(value) == 12 else value
        for name, value in given.items()
    }
    result, expected = solve(given, backend=backend), truth(rest)
    assert result.gradients["student_hidden"][ignored].count_nonzero() == 0
    result.gradients["student_hidden"] = result.gradients["student_hidden"][~ignored]
    for name, gradient in result.gradients.items():
        assert relative_error(gradient, expected.gradients[name]) <= 1e-4, name


def test_without_a_valid_token_the_loss_is_zero_and_has_a_graph(backend):
    result = solve(problem("everything") | {"token_weights": torch.zeros(12)}, backend=backend)
    assert result.loss == 0
    assert result.gradients.keys() == {"student_hidden", "weight", "bias"}
    assert all(gradient.count_nonzero() == 0 for gradient in result.gradients.values())


def test_a_second_backward_is_refused(backend):
    given = problem("forward_kl")
    loss = fused_hsd_loss(**given | learned(given), backend=backend).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.gradient
@pytest.mark.parametrize("upstream", [-3.0, 1e-3])
def test_the_upstream_gradient_counts(backend, upstream):
    given = problem("everything")
    result = solve(given, backend=backend, upstream=upstream)
    assert_matches(result, truth(given, upstream=upstream))


@pytest.mark.gradient
def test_inputs_need_not_be_contiguous(backend):
    given = problem("everything", lead=(6, 5))
    strided = {
        name: value.transpose(0, 1).contiguous().transpose(0, 1)
        if isinstance(value, torch.Tensor) and value.dim() > 1
        else value
        for name, value in given.items()
    }
    strided["bias"] = given["bias"].repeat_interleave(2)[::2]
    assert not strided["student_hidden"].is_contiguous()
    assert_matches(solve(strided, backend=backend), truth(given))


@pytest.mark.gradient
@pytest.mark.parametrize("vocab", [2, 33, 64, 129, 2049])
def test_the_vocabulary_may_have_any_size(backend, vocab):
    given = problem("jsd", vocab=vocab, lead=(3,))
    assert_matches(solve(given, backend=backend), truth(given))


@pytest.mark.gradient
@pytest.mark.parametrize("beta", [0, 1e-3, 0.5, 1 - 1e-3, 1])
def test_the_jsd_at_and_near_its_ends(backend, beta):
    given = problem("forward_kl") | {"divergence": "jsd", "jsd_beta": beta}
    assert_matches(solve(given, backend=backend), truth(given))


@pytest.mark.gradient
def test_the_jsd_of_what_one_side_rules_out_is_finite(backend):
    """In probability space it is 0 * -inf from 104 nats on."""
    given = problem("forward_kl", lead=(3,)) | {"divergence": "jsd", "bias": None}
    given["teacher_hidden"] = 60 * given["teacher_hidden"]
    result, expected = solve(given, backend=backend), truth(given)
    assert_matches(result, expected)
    logits = given["teacher_hidden"] @ given["weight"].T
    assert logits.log_softmax(-1).min() < -104


def test_the_gradient_of_a_bf16_head_is_not_rounded_to_bf16(backend):
    given = problem("forward_kl", torch.bfloat16, lead=(64,))
    total = torch.zeros(37, 8)
    halves = [
        {n: v[i::2] if isinstance(v, torch.Tensor) and len(v) == 64 else v
         for n, v in given.items()}
        for i in range(2)
    ]  # fmt: skip
    for half in halves:
        head = half["weight"].detach().requires_grad_()
        fused_hsd_loss(**half | {"weight": head}, weight_grad_out=total, backend=backend)
        assert head.grad is None
    left = relative_error(total.bfloat16(), total)
    assert total.dtype == torch.float32 and left > 1e-3  # its own digits, beyond those of bf16
    expected = sum(truth(half).gradients["weight"] for half in halves)
    assert relative_error(total, expected) <= (1e-4 if backend == "cpu" else 5e-3)


def test_equal_sides_have_no_loss_and_no_gradient(backend):
    draw = Draw((7,), vocab=301)
    states, head = draw.states().float(), draw.head().float()
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        given = {"student_hidden": states, "teacher_hidden": states.clone(), "weight": head}
        result = solve(given | {"divergence": divergence}, backend=backend)
        assert result.loss == 0
        assert all(gradient.count_nonzero() == 0 for gradient in result.gradients.values())
