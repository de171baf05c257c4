"""Every line of the statistics table, value and gradient, against fp64 autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_problems import Draw, relative_error
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.torch_rows import row_grad, row_stats
from hsd_kernels.statistics import DIFFERENTIABLE, Row, coefficients, named_statistics

ROWS, VOCAB = 6, 23
EXACT = 1e-12


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jensen_shannon(z: Tensor, u: Tensor, beta: float) -> Tensor:
    p, q = z.softmax(-1), u.softmax(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * kl(q.log(), log_m) + (1 - beta) * kl(p.log(), log_m)


def formula(name: str, z: Tensor, u: Tensor, w: Tensor, y: Tensor, beta: float) -> Tensor:
    """The value column of the table, of the logits of student, teacher and reference."""
    log_p, log_q, log_r = z.log_softmax(-1), u.log_softmax(-1), w.log_softmax(-1)
    formulas: dict[str, Callable[[], Tensor]] = {
        "lse": lambda: z.exp().sum(-1).log(),
        "logprob": lambda: log_p.gather(-1, y[:, None]).squeeze(-1),
        "entropy": lambda: -(log_p.exp() * log_p).sum(-1),
        "forward_kl": lambda: kl(log_q, log_p),
        "reverse_kl": lambda: kl(log_p, log_q),
        "jsd": lambda: jensen_shannon(z, u, beta),
        "ref_kl": lambda: kl(log_p, log_r),
        "teacher_lse": lambda: u.exp().sum(-1).log(),
        "teacher_logprob": lambda: log_q.gather(-1, y[:, None]).squeeze(-1),
        "teacher_entropy": lambda: -(log_q.exp() * log_q).sum(-1),
        "top1_agree": lambda: (z.argmax(-1) == u.argmax(-1)).double(),
    }
    return formulas[name]()


class Rows:
    """Raw logits of three models, and how they become logits."""

    def __init__(
        self, source: str, *, softcap: float | None, own_temperature: bool, beta: float = 0.3
    ) -> None:
        draw = Draw((ROWS,), vocab=VOCAB)
        self.source, self.softcap, self.beta = source, softcap, beta
        self.scale, self.own_temperature = 0.8, own_temperature
        self.student = 2 * draw.normal(ROWS, VOCAB)
        self.teacher = self.student + draw.normal(ROWS, VOCAB)
        self.reference = self.student + 0.1 * draw.normal(ROWS, VOCAB)
        self.targets = draw.targets()[:ROWS]
        self.temperature = draw.per_token(0.7, 1.5)
        self.teacher_temperature = draw.per_token(0.7, 1.5) if own_temperature else self.temperature

    def formula(self, name: str, student: Tensor) -> Tensor:
        def logits(raw: Tensor, temperature: Tensor) -> Tensor:
            scaled = self.scale * raw
            if self.softcap is not None:
                scaled = self.softcap * torch.tanh(scaled / self.softcap)
            return scaled / temperature[:, None]

        return formula(
            name,
            logits(student, self.temperature),
            logits(self.teacher, self.teacher_temperature),
            logits(self.reference, self.temperature),
            self.targets,
            self.beta,
        )

    def spec(self) -> RowSpec:
        return RowSpec(
            teacher=self.source,
            reference=self.source,
            forward_kl=True,
            reverse_kl=True,
            jsd=True,
            target=True,
            softcap=self.softcap is not None,
            same_temperature=not self.own_temperature,
        )

    def inputs(self) -> RowInputs:
        def given(other: Tensor) -> Tensor:
            return self.student - other if self.source == "difference" else other

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64)

        return RowInputs(
            student=self.student.clone(),
            teacher=given(self.teacher),
            reference=given(self.reference),
            targets=self.targets,
            inverse_temperature=1 / self.temperature,
            teacher_inverse_temperature=1 / self.teacher_temperature,
            logit_scale=number(self.scale),
            softcap=number(self.softcap or 1.0),
            jsd_beta=number(self.beta),
            jsd_complement=number(1 - self.beta),
        )


@pytest.fixture(params=["logits", "difference"])
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no softcap", "softcap"])
@pytest.mark.parametrize("own_temperature", [False, True], ids=["one temperature", "two"])
class TestTable:
    @pytest.mark.parametrize(
        "name", [*DIFFERENTIABLE, "teacher_lse", "teacher_logprob", "teacher_entropy", "top1_agree"]
    )
    def test_value(self, name, source, softcap, own_temperature):
        rows = Rows(source, softcap=softcap, own_temperature=own_temperature)
        found = named_statistics(row_stats(rows.spec(), rows.inputs(), fused=False))[name]
        assert relative_error(found, rows.formula(name, rows.student)) <= EXACT

    @pytest.mark.parametrize("name", DIFFERENTIABLE)
    def test_gradient_lies_in_the_span(self, name, source, softcap, own_temperature):
        rows = Rows(source, softcap=softcap, own_temperature=own_temperature)
        upstream = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
        assert gradient_error(rows, {name: upstream}) <= EXACT


@pytest.mark.parametrize("beta", [1e-3, 0.5, 1 - 1e-3])
def test_jsd_at_lopsided_mixtures(beta, source):
    rows = Rows(source, softcap=None, own_temperature=False, beta=beta)
    upstream = torch.ones(ROWS, dtype=torch.float64)
    # The formula itself, summed in probability space, is what loses digits at 1e-3.
    assert gradient_error(rows, {"jsd": upstream}) <= 10 * EXACT


def test_any_mix_of_statistics_is_one_point_of_the_span(source):
    rows = Rows(source, softcap=5.0, own_temperature=False)
    draw = Draw((ROWS,), seed=1)
    assert gradient_error(rows, {name: draw.normal(ROWS) for name in DIFFERENTIABLE}) <= EXACT


def test_row_grad_returns_the_mass_of_the_gradient_that_it_writes(source):
    rows = Rows(source, softcap=5.0, own_temperature=False)
    gradient, mass = solved(rows, {"jsd": torch.ones(ROWS, dtype=torch.float64)})
    torch.testing.assert_close(mass, gradient.abs().sum(-1))


def test_statistics_that_were_not_asked_for_are_nan():
    rows = Rows("absent", softcap=None, own_temperature=False)
    inputs = rows.inputs()._replace(teacher=None, reference=None, targets=None)
    spec = RowSpec()
    found = named_statistics(row_stats(spec, inputs, fused=False))
    computed = {name for name, values in found.items() if not values.isnan().any()}
    assert computed == {"lse", "entropy"}


def test_a_statistic_without_a_gradient_does_not_spread_its_nan():
    rows = torch.full((len(Row), ROWS), torch.nan, dtype=torch.float64)
    one = torch.ones(ROWS, dtype=torch.float64)
    along = coefficients({"forward_kl": one}, rows, jsd_complement=torch.tensor(0.5))
    assert all(value.isfinite().all() for value in along)


def solved(rows: Rows, upstream: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient by the raw student logits, and its mass."""
    inputs = rows.inputs()
    statistics = row_stats(rows.spec(), inputs, fused=False)
    along = coefficients(upstream, statistics, jsd_complement=inputs.jsd_complement)
    mass = row_grad(rows.spec(), inputs, statistics, along, inputs.student, fused=False)
    return inputs.student, mass


def gradient_error(rows: Rows, upstream: dict[str, Tensor]) -> float:
    leaf = rows.student.clone().requires_grad_()
    total = sum((g * rows.formula(name, leaf)).sum() for name, g in upstream.items())
    (expected,) = torch.autograd.grad(total, leaf)
    return relative_error(solved(rows, upstream)[0], expected)
