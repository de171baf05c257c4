"""The error that `row_errors` expects of rounded logits, against what rounding does."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import Draw, likely_token, relative_error, scale_and_height, step
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.torch_errors import row_errors, row_gradient_errors, row_statistics_errors
from hsd_kernels.rows.torch_rows import row_grad, row_stats
from hsd_kernels.statistics import Row, coefficients, named_statistics

ROWS, VOCAB = 24, 300
NAMES = ("forward_kl", "reverse_kl", "jsd", "ref_kl")


def chunk(name: str, kl: float, entropy: float) -> tuple[RowSpec, RowInputs, dict[str, Tensor]]:
    """Rows stored in bf16, and what they were before."""
    draw = Draw((ROWS,), vocab=VOCAB)
    noise, direction = draw.normal(ROWS, VOCAB), draw.normal(ROWS, VOCAB)
    scale, height = scale_and_height(entropy, noise)
    student = scale * noise + height * likely_token(noise)
    difference = -step(kl, student, direction) * direction
    exact = {"student": student - student.mean(), "difference": difference}
    side = "reference" if name == "ref_kl" else "teacher"
    wanted = {} if name == "ref_kl" else {name: True}
    spec = RowSpec(**{side: "difference"}, **wanted, target=True)
    number, one = torch.tensor(1.0), torch.ones(ROWS)
    x = RowInputs(
        student=exact["student"].bfloat16(),
        teacher=None,
        reference=None,
        targets=draw.targets(),
        inverse_temperature=1.3 * one,
        teacher_inverse_temperature=1.3 * one,
        logit_scale=0.9 * number,
        softcap=number,
        jsd_beta=0.3 * number,
        jsd_complement=0.7 * number,
    )
    return spec, x._replace(**{side: difference.bfloat16()}), exact


def solved(spec: RowSpec, x: RowInputs, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics, gradient (C, V) and column errors (3, V) of the statistic."""
    rows = row_stats(spec, x, fused=False)
    one = torch.ones(ROWS, dtype=rows.dtype)
    along = coefficients({name: one}, rows, jsd_complement=x.jsd_complement)
    gradient = torch.empty(x.student.shape, dtype=rows.dtype)
    row_grad(spec, x, rows, along, gradient, fused=False)
    return rows, gradient, row_errors(spec, x, rows, along, fused=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entropy", [0.1, 3.0, 5.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 5.0])
def test_the_gradients_error_is_bounded_and_the_kls_is_met(name, kl, entropy):
    spec, x, exact = chunk(name, kl, entropy)
    side = "reference" if name == "ref_kl" else "teacher"
    wide = {n: t.double() for n, t in x._asdict().items() if t is not None and n != "targets"}
    wide |= {"student": exact["student"], side: exact["difference"]}
    rows, gradient, errors = solved(spec, x, name)
    true_rows, true_gradient, _ = solved(spec, x._replace(**wide), name)
    expected, size, of_values = errors.sum(-1)
    assert size.sqrt().item() == pytest.approx(gradient.norm().item(), rel=1e-4)
    share = relative_error(gradient, true_gradient) / (expected / size).sqrt().item()
    # Columns are taken to be independent: where one holds all the mass, it is too careful.
    assert share <= 1.0
    if entropy >= 3 and name != "jsd":
        assert share >= 0.25
    found, true = (named_statistics(r)[name].double() for r in (rows, true_rows))
    real = ((found - true) / true.clamp(min=1e-5)).square().mean().sqrt()
    share = (real / (of_values / ROWS).sqrt()).item()
    assert 0.5 <= share <= 1.4


def test_without_a_second_side_only_the_student_is_rounded():
    _, x, exact = chunk("forward_kl", 1.0, 3.0)
    spec = RowSpec(target=True)
    x = x._replace(teacher=None)
    wide = {n: t.double() for n, t in x._asdict().items() if t is not None and n != "targets"}
    _, gradient, errors = solved(spec, x, "entropy")
    _, true, _ = solved(spec, x._replace(**wide | {"student": exact["student"]}), "entropy")
    expected, size, of_values = errors.sum(-1)
    assert 0.4 <= relative_error(gradient, true) / (expected / size).sqrt().item() <= 1.5
    assert of_values == 0


def test_exact_logits_have_no_error():
    spec, x, _ = chunk("jsd", 1.0, 3.0)
    rows = row_stats(spec, x, fused=False)
    zero = torch.zeros_like(x.student)
    along = coefficients({"jsd": torch.ones(ROWS)}, rows, jsd_complement=x.jsd_complement)
    assert not rows[Row.JSD].isnan().any()
    x = x._replace(student=zero, teacher=zero)
    rows = row_stats(spec, x, fused=False)
    assert row_errors(spec, x, rows, along, fused=False)[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_rows_add_up_to_those_of_columns(name):
    spec, x, _ = chunk(name, 1e-2, 3.0)
    rows, _, errors = solved(spec, x, name)
    one = torch.ones(ROWS, dtype=rows.dtype)
    along = coefficients({name: one}, rows, jsd_complement=x.jsd_complement)
    sums = row_gradient_errors(spec, x, rows, along, fused=False)
    torch.testing.assert_close(sums.sum(-1), errors.sum(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("entropy", [0.1, 3.0, 5.0])
@pytest.mark.parametrize("kl", [1e-2, 1.0])
def test_the_error_of_statistics_holds_that_of_kl_and_of_log_probs(kl, entropy):
    spec, x, exact = chunk("forward_kl", kl, entropy)
    wide = {n: t.double() for n, t in x._asdict().items() if t is not None and n != "targets"}
    wide |= {"student": exact["student"], "teacher": exact["difference"]}
    rows, _, of_columns = solved(spec, x, "forward_kl")
    expected = row_statistics_errors(spec, x, rows, fused=False)
    of_log_probs = expected.sum() - of_columns[2].sum()
    found = named_statistics(rows)
    true = named_statistics(row_stats(spec, x._replace(**wide), fused=False))
    names = ("lse", "entropy", "teacher_lse", "teacher_entropy")
    real = sum((found[name] - true[name]).square().sum() for name in names) / len(names)
    assert 0.5 <= (real / of_log_probs).sqrt() <= 1.4
