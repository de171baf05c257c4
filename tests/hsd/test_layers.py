"""What is done to the layers of a model that is not sharded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hsd.config import ObjectiveConfig
from hsd.objective.step import accumulate_gradients
from hsd.policy.layers import checkpoint_activations, compile_layers, decoder_layers
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy


def gradient(policy: Policy, rows: list[TrainingRow]) -> tuple[Tensor, int]:
    """The gradient, and the bytes that autograd kept for it."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    policy.model.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        accumulate_gradients(
            policy, rows, ObjectiveConfig(), micro_batch_tokens=10_000, temperature=1.0
        )
    grads = [each.grad for each in policy.model.parameters() if each.grad is not None]
    return torch.cat([each.flatten() for each in grads]), sum(kept.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2-softcap", "gpt2-positions"])
def test_checkpointed_layers_give_the_same_gradient_and_keep_less_for_it(
    kind: str, make_policy: Callable[..., Policy], make_row: Callable[..., TrainingRow]
) -> None:
    rows = [make_row(n, context=40, response=30) for n in range(4)]
    plain, checkpointed = make_policy(kind), make_policy(kind)
    names = set(checkpointed.model.state_dict())
    checkpoint_activations(checkpointed.model)
    (expected, much), (found, little) = gradient(plain, rows), gradient(checkpointed, rows)
    assert torch.equal(found, expected)
    assert little < 0.5 * much
    assert set(checkpointed.model.state_dict()) == names


@pytest.mark.parametrize("change", [checkpoint_activations, compile_layers])
def test_a_copy_of_a_changed_model_runs_its_own_layers(
    change: Callable[[Any], None],
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = make_model()
    change(model)
    copied = copy.deepcopy(model)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = copied(ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(ids).logits, before)
        for parameter in copied.model.layers.parameters():
            parameter.mul_(2)
        assert not torch.equal(copied(ids).logits, before)


def test_the_layers_of_a_model_are_found_in_order(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    assert decoder_layers(model) == list(model.model.layers)


def test_a_model_without_layers_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model._no_split_modules = None
    with pytest.raises(ValueError, match="model: found LlamaForCausalLM without decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_are_one_graph_each_and_give_the_same_gradient(
    checkpointed: bool,
    make_policy: Callable[..., Policy],
    make_row: Callable[..., TrainingRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [make_row(n, response=5) for n in range(2)]
    plain, compiled = make_policy(), make_policy()
    # The graphs are what is ours; no minutes of C++ compilation for 32 dimensions.
    graphs = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", graphs)
    compile_layers(compiled.model)
    if checkpointed:
        checkpoint_activations(compiled.model)
    expected, found = gradient(plain, rows)[0], gradient(compiled, rows)[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()
