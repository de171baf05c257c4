"""The fp32 contract of the row kernels: given logits, against fp64 of the same logits."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from kernel_problems import Draw, likely_token, relative_error, scale_and_height, step
from torch import Tensor

from hsd_kernels.reference import divergences, kl_divergence
from hsd_kernels.rows import RowInputs, RowSpec, compiled
from hsd_kernels.rows.torch_rows import row_grad, row_stats
from hsd_kernels.statistics import DIFFERENTIABLE, coefficients, named_statistics

GRADIENT, VALUE = 1e-5, 1e-3  # relative; values from 1e-5 nats
OFFSETS = ((0, 0), (40, 40), (-40, -40), (40, 0), (0, -40))  # of student and teacher, row by row
VOCABULARY = {0.1: 512, 3.0: 512, 6.0: 512, 11.0: 65_536}  # by entropy in nats
needs_compiler = pytest.mark.skipif(
    not compiled.compiler_found(), reason="torch.compile finds no C++ compiler"
)
STATISTICS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 1e-3),
    ("jsd", 1 - 1e-3),
    ("ref_kl", 0.5),
]


@functools.cache
def regime(kl: float, entropy: float) -> tuple[Tensor, Tensor]:
    """fp64 logits of student and other side: the student's entropy, KL(student || other)."""
    draw = Draw(vocab=VOCABULARY[entropy])
    rows = len(OFFSETS)
    noise, direction = draw.normal(rows, draw.vocab), draw.normal(rows, draw.vocab)
    scale, height = scale_and_height(entropy, noise)
    student = scale * noise + height * likely_token(noise)
    other = student + step(kl, student, direction) * direction
    offsets = torch.tensor(OFFSETS, dtype=torch.float64)
    return student + offsets[:, :1], other + offsets[:, 1:]


class Kernel:
    """Both row kernels for one statistic of fp32 logits, and the fp64 truth for the same logits."""

    def __init__(self, name: str, beta: float, source: str, student: Tensor, other: Tensor) -> None:
        self.name, self.beta = name, beta
        self.of_teacher = name != "ref_kl"
        raw = student.float()
        given = (raw.double() - other if source == "difference" else other).float()
        self.student = raw.double()
        self.other = self.student - given.double() if source == "difference" else given.double()
        side = "teacher" if self.of_teacher else "reference"
        wanted = {name: True} if self.of_teacher else {}
        self.spec = RowSpec(**{side: source}, **wanted)
        one = torch.ones(len(raw))
        self.inputs = RowInputs(
            student=raw.clone(),
            teacher=given if self.of_teacher else None,
            reference=None if self.of_teacher else given,
            targets=None,
            inverse_temperature=one,
            teacher_inverse_temperature=one,
            logit_scale=torch.tensor(1.0),
            softcap=torch.tensor(1.0),
            jsd_beta=torch.tensor(beta),
            jsd_complement=torch.tensor(1 - beta),
        )

    def truth(self) -> tuple[Tensor, Tensor]:
        """Values (rows,) and gradients (rows, V) by the student's logits."""
        leaf = self.student.clone().requires_grad_()
        log_p, log_q = leaf.log_softmax(-1), self.other.log_softmax(-1)
        if self.of_teacher:
            value = divergences(log_p, log_q, beta=self.beta)[self.name]
        else:
            value = kl_divergence(log_p, log_q)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def run(self, *, fused: bool = False) -> tuple[Tensor, Tensor]:
        inputs = self.inputs._replace(student=self.inputs.student.clone())
        rows = row_stats(self.spec, inputs, fused=fused)
        one = torch.ones(len(self.student))
        along = coefficients({self.name: one}, rows, jsd_complement=inputs.jsd_complement)
        row_grad(self.spec, inputs, rows, along, inputs.student, fused=fused)
        return named_statistics(rows)[self.name], inputs.student


@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize("entropy", VOCABULARY)
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize(("name", "beta"), STATISTICS)
def test_contract(name, beta, kl, entropy, source):
    kernel = Kernel(name, beta, source, *regime(kl, entropy))
    values, gradients = kernel.run()
    true_values, true_gradients = kernel.truth()
    assert relative_error(gradients, true_gradients) <= GRADIENT
    large = true_values >= 1e-5
    torch.testing.assert_close(
        values.double()[large], true_values[large], rtol=VALUE, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize("above", [4.0, 8.0, 12.0])
@pytest.mark.parametrize(("name", "beta"), STATISTICS)
def test_contract_where_the_student_is_surer_of_the_other_sides_best_token(
    name, beta, above, source
):
    """Then log sum q exp(e) is the log of almost nothing."""
    draw = Draw(vocab=16_384)
    other = 0.3 * draw.normal(2, draw.vocab)
    best = torch.nn.functional.one_hot(other.argmax(-1), draw.vocab)
    kernel = Kernel(name, beta, source, other + above * best, other)
    values, gradients = kernel.run()
    true_values, true_gradients = kernel.truth()
    assert relative_error(gradients, true_gradients) <= GRADIENT
    assert relative_error(values, true_values) <= 1e-5


def test_the_comparison_sees_each_mutation():
    """Row gradients do not pass through the op, where tests/conftest.py injects mutations."""
    _, gradients = Kernel("forward_kl", 0.5, "logits", *regime(1.0, 3.0)).truth()
    for mutated in (gradients * 0, gradients * 1.05, gradients.roll(1, 0)):
        assert relative_error(mutated, gradients) > 1e3 * GRADIENT


@needs_compiler
@pytest.mark.parametrize(("name", "beta"), [("forward_kl", 0.5), ("jsd", 1e-3)])
def test_compiled_kernels_meet_the_contract_and_equal_the_plain_ones(name, beta):
    for kl, entropy in ((1e-4, 0.1), (1e-2, 3.0), (10.0, 0.1)):
        kernel = Kernel(name, beta, "difference", *regime(kl, entropy))
        values, gradients = kernel.run(fused=True)
        plain_values, plain_gradients = kernel.run()
        assert relative_error(gradients, kernel.truth()[1]) <= GRADIENT
        assert relative_error(gradients, plain_gradients) <= GRADIENT
        torch.testing.assert_close(values, plain_values, rtol=1e-4, atol=1e-9)


@needs_compiler
def test_any_number_of_specifications_can_be_compiled(monkeypatch):
    """Dynamo gives up after 8 compilations of one code object."""
    without_inductor = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda f, *, options, **kwargs: without_inductor(f, **kwargs)
    )
    compiled.fused.cache_clear()
    try:
        for source in ("logits", "difference"):
            for name, beta in STATISTICS[::2]:
                kernel = Kernel(name, beta, source, *regime(1.0, 3.0))
                for softcap in (False, True):
                    spec = dataclasses.replace(kernel.spec, softcap=softcap)
                    row_stats(spec, kernel.inputs, fused=True)
    finally:
        compiled.fused.cache_clear()


@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize(("name", "beta"), STATISTICS)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((0.0, 92.0), (92.0, 0.0)),  # 1e-40 where the other has all of the mass: fp32 flushes it
        ((0.0, 1e4), (0.0, 0.0)),
        ((0.0, 0.0), (1e4, 0.0)),
        ((1e4, -1e4), (-1e4, 1e4)),
        ((1e4, 1e4), (1e4, 1e4)),
    ],
    ids=["disjoint", "far student", "far teacher", "far both", "equal"],
)
def test_extremes_stay_finite(name, beta, source, student, teacher):
    def logits(pair: tuple[float, float]) -> Tensor:
        return torch.tensor([[*pair, -1.0, 0.5]], dtype=torch.float64)

    kernel = Kernel(name, beta, source, logits(student), logits(teacher))
    values, gradients = kernel.run()
    assert values.isfinite().all()
    assert gradients.isfinite().all()
    torch.testing.assert_close(values, kernel.truth()[0], rtol=VALUE, atol=1e-5, check_dtype=False)


def test_a_row_of_one_column_has_no_loss_and_no_gradient():
    for name, beta in STATISTICS:
        kernel = Kernel(name, beta, "logits", torch.full((3, 1), 7.0), torch.full((3, 1), -2.0))
        values, gradients = kernel.run()
        assert values.count_nonzero() == gradients.count_nonzero() == 0


def test_all_divergences_can_be_had_in_one_pass():
    student, other = regime(1.0, 3.0)
    kernel = Kernel("jsd", 0.5, "logits", student, other)
    spec = RowSpec(teacher="logits", forward_kl=True, reverse_kl=True, jsd=True)
    found = named_statistics(row_stats(spec, kernel.inputs, fused=False))
    expected = divergences(kernel.student.log_softmax(-1), kernel.other.log_softmax(-1), beta=0.5)
    for name in expected.keys() & set(DIFFERENTIABLE):
        assert relative_error(found[name], expected[name]) <= VALUE
