"""The learning rate, the clipped step, and what happens when a gradient is not finite."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from hsd.config import OptimizerConfig
from hsd.policy import offload
from hsd.policy.optimizer import adamw, clipped_step, learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(config, step=step, steps=steps) for step in range(steps)]


def test_a_constant_rate_is_constant() -> None:
    assert rates(4) == [1.0] * 4


def test_the_rate_rises_in_equal_steps_to_its_peak() -> None:
    assert rates(6, warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_rate_falls_in_equal_steps_from_its_peak_toward_a_tenth() -> None:
    found = rates(12, schedule="linear", warmup_steps=2)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[2:] == pytest.approx([1.0 - 0.09 * step for step in range(10)])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 5), (3, 3), (10, 3)])
def test_a_rate_is_never_zero_or_above_its_peak(
    schedule: str, steps: int, warmup_steps: int
) -> None:
    found = rates(steps, schedule=schedule, warmup_steps=warmup_steps)
    assert all(0.09 < rate <= 1.0 for rate in found)


def parameter_with(gradient: list[float]) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter


def test_the_settings_are_those_of_the_paper() -> None:
    (group,) = adamw([parameter_with([1.0])], 0.5).param_groups
    assert group["betas"] == (0.9, 0.95)
    assert (group["lr"], group["eps"], group["weight_decay"]) == (0.5, 1e-8, 0.0)


def test_a_step_uses_its_rate_and_clears_the_gradient() -> None:
    parameter = parameter_with([3.0, -4.0])
    norm = clipped_step(
        adamw([parameter], 1.0), [parameter], learning_rate=0.25, max_grad_norm=100.0
    )
    assert norm == pytest.approx(5.0)
    assert parameter.grad is None
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.75, 1.25]))


def test_gradients_are_clipped_to_their_norm() -> None:
    clipped, plain = parameter_with([3.0, -4.0]), parameter_with([0.6, -0.8])
    optimizers = [adamw([parameter], 1.0) for parameter in (clipped, plain)]
    for optimizer, parameter in zip(optimizers, (clipped, plain), strict=True):
        clipped_step(optimizer, [parameter], learning_rate=0.1, max_grad_norm=1.0)
    torch.testing.assert_close(
        optimizers[0].state[clipped]["exp_avg"], optimizers[1].state[plain]["exp_avg"]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(value: float) -> None:
    parameter = parameter_with([1.0, value])
    with pytest.raises(FloatingPointError, match="gradient: found norm"):
        clipped_step(adamw([parameter], 1.0), [parameter], learning_rate=0.1, max_grad_norm=1.0)
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_a_step_without_any_gradient_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    norm = clipped_step(adamw([parameter], 1.0), [parameter], learning_rate=0.1, max_grad_norm=1.0)
    assert norm == 0.0
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_with_its_states_on_the_host_adamw_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (2, 2, 2))]
    plain, host = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = [adamw(plain, 0.1), adamw(host, 0.1, on_host=True)]
    for step in range(4):
        if step == 2:  # a state dict of one is a state dict of the other
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for parameters, optimizer in zip((plain, host), optimizers, strict=True):
            draw = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            parameters[step % 3].grad = None
            optimizer.step()
        for ours, theirs in zip(host, plain, strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(plain[0], start[0])


def test_what_is_stepped_in_staging_memory_is_written_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of copies and slots; that streams keep it needs a GPU to show."""
    event = SimpleNamespace(synchronize=lambda: None)
    stream = SimpleNamespace(
        wait_stream=lambda _: None, record_event=lambda: event, synchronize=lambda: None
    )
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **kw: empty(*shape, **kw))
    shapes = [(3, 4), (0, 4), (7,), (2, 2, 2), (1,)]
    pairs = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
    expected = [weight - gradient for weight, gradient in pairs]
    for weight, gradient in offload._staged(pairs):
        weight.sub_(gradient)
    assert all(torch.equal(pair[0], own) for pair, own in zip(pairs, expected, strict=True))
