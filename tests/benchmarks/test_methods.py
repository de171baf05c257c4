"""The rivals compute the loss that they are timed on; the memory and time harness can see."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from benchmarks import memory, ours, synthetic, timing
from benchmarks.exact import exact, loss_error, relative_error
from benchmarks.methods import METHODS, execute, methods_for
from benchmarks.work import LOSSES, Work

TOKENS, HIDDEN, VOCAB = 24, 16, 211


@pytest.fixture(scope="module")
def base() -> Work:
    return synthetic.make(TOKENS, HIDDEN, VOCAB)


def as_loss(work: Work, loss: str) -> Work:
    with_reference = {}
    if loss == "with_reference":
        generator = torch.Generator().manual_seed(1)
        head = work.head + 0.01 * torch.randn(work.head.shape, generator=generator)
        with_reference = {"reference": work.student * 0.9, "reference_head": head}
    return dataclasses.replace(work, loss=loss, **with_reference)


CASES = [
    (loss, method)
    for loss in sorted(set(LOSSES.values()))
    for method in METHODS
    if loss in method.losses
]


@pytest.mark.parametrize(("loss", "method"), CASES, ids=[f"{a}-{m.name}" for a, m in CASES])
def test_every_method_computes_the_loss_it_is_timed_on(base, loss, method):
    if method.version is None:
        pytest.skip(f"{method.package} is not installed")
    work = as_loss(base, loss)
    truth = exact(work, rows=10)
    found = execute(method, work, 8)
    if not method.exact:
        return
    assert loss_error(found.loss, truth.loss) <= 1e-4
    if work.differentiated:
        assert relative_error(found.student, truth.student) <= 1e-4
        assert relative_error(found.head, truth.head) <= 1e-4


def test_a_frozen_head_has_no_gradient(base):
    work = dataclasses.replace(base, trainable=False)
    truth = exact(work)
    for method in methods_for("forward_kl"):
        found = execute(method, work, 8)
        assert found.head is None or method.name.startswith("liger")
        assert not method.exact or relative_error(found.student, truth.student) <= 1e-4


def test_a_wrong_gradient_shows_in_the_error(base):
    truth = exact(base)
    assert relative_error(1.05 * truth.student, truth.student) == pytest.approx(0.05)
    assert relative_error(torch.zeros_like(truth.head), truth.head) == 1


def test_the_synthetic_work_has_a_language_models_spectrum():
    work = synthetic.make(64, 32, 3001)
    found = synthetic.spectrum(work)
    assert 0.5 <= found["entropy"] <= 1.5
    assert 0.01 <= found["forward_kl"] <= 0.1
    again = synthetic.make(64, 32, 3001)
    assert torch.equal(work.teacher, again.teacher)


def test_a_slow_method_is_seen_to_be_slow():
    found = timing.alternated(
        {"quick": lambda: time.sleep(0.01), "slow": lambda: time.sleep(0.04)}, rounds=5
    )
    assert timing.ratio(found["slow"], found["quick"]) > 2
    assert timing.ratio(found["quick"], found["slow"]) < 0.5


@pytest.mark.parametrize("mib", [16, 64])
def test_a_hungry_method_is_seen_to_be_hungry(mib):
    found = memory.measured(lambda: torch.ones(mib * 2**18).sum())
    assert found.allocated == pytest.approx(mib * 2**20, rel=0.01)
    if found.resident is not None:
        assert found.resident == pytest.approx(mib * 2**20, rel=0.25)


def test_the_chunk_budget_is_what_the_library_is_given(base):
    wide = dataclasses.replace(base, student=base.student.repeat(4, 1))
    assert ours.budget(wide, 8) == 8 * 2 * VOCAB * 4
