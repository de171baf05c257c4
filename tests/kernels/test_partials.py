"""Parts of rows, merged, against the statistics of whole rows in fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import Draw, relative_error
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import Partial, excess, finish, merge
from hsd_kernels.rows.torch_rows import row_likely, row_mixture, row_partials, row_stats
from hsd_kernels.statistics import Row

VOCAB = 37
EVERYTHING = {"forward_kl": True, "reverse_kl": True, "jsd": True, "target": True}
SPLITS = {"one": [37], "even": [12, 12, 13], "uneven": [1, 30, 1, 5], "columns": [1] * 37}
LOGITS = {  # size of the logits, and of the differences between sides
    "ordinary": (3.0, 1.0),
    "close": (3.0, 1e-3),
    "one token each": (60.0, 60.0),
    "equal": (3.0, 0.0),
}


def inputs(
    source: str, scale: float, apart: float, dtype: torch.dtype = torch.float64
) -> RowInputs:
    draw = Draw((6,), vocab=VOCAB)
    student = scale * draw.normal(6, VOCAB)
    teacher, reference = (student + apart * draw.normal(6, VOCAB) for _ in range(2))
    if source == "difference":
        teacher, reference = student - teacher, student - reference
    one = torch.ones(6, dtype=dtype)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    return RowInputs(
        student=student.to(dtype),
        teacher=teacher.to(dtype),
        reference=reference.to(dtype),
        targets=draw.targets()[:6],
        inverse_temperature=one,
        teacher_inverse_temperature=one,
        logit_scale=number(1.0),
        softcap=number(1.0),
        jsd_beta=number(0.3),
        jsd_complement=number(0.7),
    )


def split_statistics(spec: RowSpec, x: RowInputs, widths: list[int]) -> Tensor:
    """Statistics from one part per width, as ranks of a sharded vocabulary would form them."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    shards = []
    for start, width in zip(starts, widths, strict=True):
        columns = slice(start, start + width)
        own = x.targets - start
        shards.append(
            x._replace(
                student=x.student[:, columns],
                teacher=x.teacher[:, columns],
                reference=x.reference[:, columns],
                targets=torch.where((own >= 0) & (own < width), own, -1),
            )
        )
    parts = []
    for start, shard in zip(starts, shards, strict=True):
        parts.append(row_partials(spec, shard, first_column=start, fused=False))
    rows = finish(spec, merge(spec, torch.cat(parts)), x)
    sums = torch.cat([row_mixture(spec, shard, rows, fused=False) for shard in shards])
    return finish_mixture(rows, sums, x)


@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("widths", SPLITS.values(), ids=SPLITS)
def test_parts_of_any_widths_merge_to_the_whole_row(widths, kind, source):
    spec = RowSpec(teacher=source, reference=source, **EVERYTHING)
    x = inputs(source, *LOGITS[kind])
    expected = row_stats(spec, x, fused=False)
    found = split_statistics(spec, x, widths)
    for name in Row:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("source", "kind"),
    [("logits", "ordinary"), ("difference", "ordinary"), ("difference", "close")],
)
def test_merging_keeps_the_digits_of_fp32(kind, source):
    spec = RowSpec(teacher=source, reference=source, **EVERYTHING)
    scale = LOGITS[kind]
    exact = row_stats(spec, inputs(source, *scale), fused=False)
    found = split_statistics(spec, inputs(source, *scale, torch.float32), SPLITS["columns"])
    for name in (Row.FORWARD_KL, Row.REVERSE_KL, Row.REF_KL, Row.ENTROPY, Row.LOGPROB):
        assert relative_error(found[name], exact[name]) <= 1e-5, name
    assert relative_error(found[Row.JSD], exact[Row.JSD]) <= 1e-3


def test_a_far_pair_in_one_part_only():
    """The student's mass lies on tokens that its part of the teacher hardly knows."""
    x = inputs("logits", 1.0, 1.0, torch.float32)
    x.student[:, 5], x.teacher[:, 5] = 0.0, -100.0
    x.student[:, :5], x.teacher[:, :5] = -100.0, -50.0
    spec = RowSpec(teacher="logits", reference="logits", **EVERYTHING)
    wide = RowInputs(*(t.double() if t.is_floating_point() else t for t in x))
    expected = row_stats(spec, wide, fused=False)
    for widths in SPLITS.values():
        found = split_statistics(spec, x, widths)
        assert found.isfinite().all()
        for name in (Row.FORWARD_KL, Row.REVERSE_KL, Row.FORWARD_LOG_RATIO, Row.REVERSE_MEAN):
            assert relative_error(found[name], expected[name]) <= 1e-5, name


def test_a_part_without_columns_adds_nothing():
    spec = RowSpec(teacher="difference", reference="difference", **EVERYTHING)
    x = inputs("difference", 3.0, 1.0)
    part = row_partials(spec, x, fused=False)
    empty = torch.full_like(part, torch.nan)
    for line in (Partial.MAX, Partial.TEACHER_MAX, Partial.REFERENCE_MAX):
        empty[:, line], empty[:, line + 1] = -torch.inf, 0.0
    empty[:, Partial.TARGET] = empty[:, Partial.TEACHER_TARGET] = -torch.inf
    for parts in ([empty, part], [part, empty], [empty, part, empty]):
        merged = merge(spec, torch.cat(parts))
        assert merged.isfinite().all()
        torch.testing.assert_close(merged, part[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_keeps_its_digits_at_every_size(dtype):
    e = torch.cat([sign * torch.logspace(-6, 1.2, 200, dtype=dtype) for sign in (1, -1)])
    shift = torch.linspace(-5, 0, len(e), dtype=dtype)
    exact = e.double()
    expected = torch.special.expm1(exact) - exact
    series = sum(exact**n / torch.lgamma(torch.tensor(n + 1.0).double()).exp() for n in range(2, 9))
    expected = shift.double().exp() * torch.where(exact.abs() < 1e-2, series, expected)
    error = (excess(shift, e).double() - expected).abs() / expected
    assert error.max() <= (3e-6 if dtype == torch.float32 else 1e-13)


def test_likely_columns_are_each_sides_likeliest():
    x = inputs("difference", 3.0, 1.0)
    spec = RowSpec(teacher="difference", reference="difference", **EVERYTHING)
    found = row_likely(spec, x, fused=False)
    for side in (x.student, x.student - x.teacher, x.student - x.reference):
        top = side[:, :32].argmax(-1, keepdim=True)  # the last five lie in no whole lane
        assert (found == top).any(-1).all()


def test_a_mean_far_from_the_most_likely_token_costs_no_digits():
    """A likely token whose difference lies far from the others', which are close to each other."""
    x = inputs("difference", 0.1, 1e-4)
    x.student[:, 3], x.teacher[:, 3] = 1.0, 0.8
    x.student[:, 4:] -= 1e-3
    spec = RowSpec(teacher="difference", reference="difference", **EVERYTHING)
    narrow = RowInputs(*(t.float() if t.is_floating_point() else t for t in x))
    wide = RowInputs(*(t.double() if t.is_floating_point() else t for t in narrow))
    exact = row_stats(spec, wide, fused=False)
    found = row_stats(spec, narrow, fused=False)
    for name in (Row.FORWARD_KL, Row.REVERSE_KL, Row.FORWARD_LOG_RATIO, Row.REVERSE_MEAN):
        assert relative_error(found[name], exact[name]) <= 1e-5, name
