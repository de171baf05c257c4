"""examples/ run, and do what they say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_loss_of_the_plain_loop_falls():
    losses = example("plain_loop").train(24)
    assert all(later < 0.7 * earlier for earlier, later in zip(losses, losses[12:], strict=False))


# TRL


@pytest.fixture
def trl_sdpo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    return example("trl_sdpo")


def trained(trainer: Any) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """The log entries of the steps, and how far each weight has moved."""
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    moved = [a.detach() - b for a, b in zip(trainer.model.parameters(), before, strict=True)]
    return steps, moved


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("teacher", ["ema", "live"])
def test_sdpo_with_the_fused_loss_trains_as_with_trls_own(tmp_path, trl_sdpo, teacher, alpha):
    settings = {"teacher_model_kind": teacher, "distillation_alpha": alpha, "temperature": 0.9}
    # An update in proportion to the gradient: Adam would hide its size.
    settings |= {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2}

    def run(name: str, trainer: type) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        return trained(trl_sdpo.make_trainer(str(tmp_path / name), trainer, **settings))

    fused, moved = run("fused", trl_sdpo.FusedSDPOTrainer)
    theirs, expected = run("theirs", trl_sdpo.SDPOTrainer)
    assert len(fused) == len(theirs) == 3
    for ours, other in zip(fused, theirs, strict=True):
        for key in ("loss", "grad_norm", "sdpo/distillation_loss", "completions/mean_length"):
            assert math.isclose(ours[key], other[key], rel_tol=1e-3), key
        assert other["loss"] > 0
    for ours, other in zip(moved, expected, strict=True):
        assert other.norm() > 0
        assert (ours - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distillation_mode", "topk_logits"),
        ("distillation_weight", 0.5),
        ("distillation_is_clip", 2.0),
    ],
)
def test_what_the_sdpo_example_lacks_is_refused(tmp_path, trl_sdpo, name, value):
    with pytest.raises(ValueError, match=f"{name}: found {value!r}"):
        trl_sdpo.make_trainer(str(tmp_path), distillation_topk=4, **{name: value})
