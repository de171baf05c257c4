"""What the Triton row kernels promise beside their formulas: bits, memory, traffic, rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_problems import Draw, cast, relative_error, solve
from torch import Tensor
from triton.runtime import interpreter
from triton_problems import SIDES, Rows, pitched, plain_rows, spec_of, stored_rows

from hsd_kernels import precision
from hsd_kernels.rows import RowInputs, RowSpec, torch_errors, torch_rows, triton_math, triton_rows
from hsd_kernels.rows.mixture import finish_mixture
from hsd_kernels.rows.partials import Partial, finish, merge
from hsd_kernels.rows.torch_gradient import masses as torch_masses
from hsd_kernels.rows.triton_rows import TILE
from hsd_kernels.statistics import DIVERGENCES, Row, coefficients, named_statistics

EVERYTHING = {"forward_kl": True, "reverse_kl": True, "jsd": True, "target": True}


def chunk(
    rows: int, columns: int, source: str = "logits", dtype: torch.dtype = torch.float32
) -> Rows:
    draw = Draw((rows,), vocab=columns)
    student = 3 * draw.normal(rows, columns)
    sides = {s: student + draw.normal(rows, columns) for s in ("teacher", "reference")}
    spec = RowSpec(teacher=source, reference=source, **EVERYTHING)
    return stored_rows(spec, {"student": student, **sides}, dtype=dtype, targets=draw.targets())


@pytest.mark.parametrize("source", ["logits", "difference"])
def test_any_distribution_of_tiles_gives_the_same_bits(source):
    rows = chunk(3, 4 * TILE + 5, source)

    def results(tiles_per_program: int) -> list[Tensor]:
        statistics = rows.statistics(tiles_per_program)
        return [statistics, *rows.gradient(statistics, "jsd", tiles_per_program=tiles_per_program)]

    expected = results(1)
    assert expected[0].isfinite().all()
    for tiles_per_program in (2, 3, 100):
        for found, bits in zip(results(tiles_per_program), expected, strict=True):
            assert torch.equal(found, bits)


def test_the_order_of_rows_changes_nothing_but_their_order():
    rows = chunk(7, 301)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    stored = {side: pitched(values[order], values.dtype) for side, values in rows.stored.items()}
    moved = Rows(**{**vars(rows), "stored": stored, "targets": rows.targets[order]})
    assert torch.equal(moved.statistics(), rows.statistics()[:, order])


@pytest.mark.parametrize("source", ["logits", "difference"])
def test_statistics_are_those_of_the_other_backend(source):
    """Every line, also those that no loss reads."""
    rows = chunk(4, TILE + 301, source)
    x = rows.inputs
    wide = x._replace(**{n: t.double() for n, t in x._asdict().items() if t.is_floating_point()})
    expected = torch_rows.row_stats(rows.spec, wide, fused=False)
    found = rows.statistics()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    first = triton_rows.row_partials(rows.spec, x, first_column=1000)
    for line in (Partial.TOP, Partial.TEACHER_TOP):
        assert torch.equal(first[:, line], triton_rows.row_partials(rows.spec, x)[:, line] + 1000)
    assert found[Row.TOP1_AGREE].tolist() == expected[Row.TOP1_AGREE].tolist()


@pytest.mark.parametrize("name", [*DIVERGENCES, "ref_kl", "entropy"])
def test_errors_of_rounding_are_those_of_the_other_backend(name):
    """Over two blocks of rows and two tiles, with an entropy and a log-prob term."""
    rows, columns = 35, TILE + 301
    draw = Draw((rows,), vocab=columns)
    student = 3 * draw.normal(rows, columns)
    sides = {s: student + draw.normal(rows, columns) for s in ("teacher", "reference")}
    if name == "entropy":  # with a teacher that only statistics are asked of
        spec = RowSpec(teacher="difference", target=True)
    else:
        spec = spec_of(name, "difference", target=True)
    temperature = 0.5 + draw.per_token().float()
    stored = stored_rows(
        spec,
        {"student": student, **sides},
        dtype=torch.bfloat16,
        scale=0.7,
        beta=0.2,
        targets=draw.targets(),
        temperature=temperature,
        teacher_temperature=temperature,
    )
    x, statistics = stored.inputs, stored.statistics()
    weights = {n: draw.per_token().float() for n in (name, "entropy", "logprob")}
    along = coefficients(weights, statistics, jsd_complement=x.jsd_complement)
    found = triton_rows.row_errors(spec, x, statistics, along)
    expected = torch_errors.row_errors(spec, x, statistics, along, fused=False)
    for line in range(2 if name == "entropy" else 3):
        assert relative_error(found[line], expected[line]) <= 1e-4, line
    if name == "entropy":
        assert found[2].count_nonzero() == 0
    assert torch.equal(found, triton_rows.row_errors(spec, x, statistics, along))


def parts_of(spec: RowSpec, tiles: int, apart: float) -> tuple[Tensor, RowInputs]:
    """fp32 statistics of tiles of four columns of 11 rows, and the inputs of the whole rows."""
    rows, columns = 11, 4 * tiles
    draw = Draw((rows,), vocab=columns)
    student = max(apart, 3.0) * draw.normal(rows, columns)
    sides = {s: student + apart * draw.normal(rows, columns) for s in ("teacher", "reference")}
    logits = {"student": student, **sides}
    x = stored_rows(spec, logits, dtype=torch.float32, targets=draw.targets()).inputs
    parts = []
    for first in range(0, columns, 4):
        own = x.targets - first
        cut = {side: getattr(x, side)[:, first : first + 4] for side in SIDES}
        part = x._replace(**cut, targets=torch.where((own >= 0) & (own < 4), own, -1))
        parts.append(torch_rows.row_partials(spec, part, first_column=first, fused=False))
    return torch.cat(parts), x


@pytest.mark.parametrize("tiles", [1, 2, 3, 8, 75])
@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize("apart", [1e-3, 1.0, 60.0])
def test_tiles_merge_as_parts_do(apart, source, tiles):
    """In fp64, of the same parts; 60 puts the sides' mass on tiles that the other hardly knows."""
    spec = RowSpec(teacher=source, reference=source, **EVERYTHING)
    parts, x = parts_of(spec, tiles, apart)
    found, whole = triton_rows.merge_tiles(spec, parts)[0], merge(spec, parts)
    expected = merge(spec, parts.double())
    for line in Partial:
        if "EXCESS" not in line.name:
            close = {"rtol": 2e-6, "atol": 2e-6, "msg": lambda m, n=line.name: f"{n}: {m}"}
            torch.testing.assert_close(found[line].double(), expected[line], **close)
    # Parts' means near 1 of KLs near 1e-6 lose digits in fp32; in torch as here.
    statistics, other, truth = (finish(spec, part, x) for part in (found, whole, expected))
    for name in (Row.FORWARD_KL, Row.REVERSE_KL, Row.REF_KL):
        error, others = (relative_error(each[name], truth[name]) for each in (statistics, other))
        assert error <= max(1e-5, 2 * others), name


def test_rows_merge_alike_wherever_they_lie():
    spec = RowSpec(teacher="logits", reference="difference", **EVERYTHING)
    parts, _ = parts_of(spec, 3, 1.0)
    merged, order = (
        triton_rows.merge_tiles(spec, parts),
        torch.tensor([3, 0, 6, 10, 1, 5, 9, 2, 4, 8, 7]),
    )
    assert torch.equal(triton_rows.merge_tiles(spec, parts[..., order]), merged[..., order])
    wide = parts.repeat(1, 1, 100)  # of several programs
    assert torch.equal(triton_rows.merge_tiles(spec, wide), merged.repeat(1, 1, 100))


def test_a_shard_without_columns_adds_nothing():
    rows = chunk(3, 40)
    x = rows.inputs
    none = {side: pitched(values[:, :0], values.dtype) for side, values in rows.stored.items()}
    empty = x._replace(**none, targets=torch.full((3,), -1))
    parts = [triton_rows.row_partials(rows.spec, part) for part in (x, empty)]
    assert (parts[1][:, Partial.MAX] == -torch.inf).all()
    assert (parts[1][:, Partial.SUM] == 0).all()
    whole = finish(rows.spec, merge(rows.spec, torch.cat(parts)), x)
    expected = finish(rows.spec, merge(rows.spec, parts[0]), x)
    torch.testing.assert_close(whole, expected, equal_nan=True)
    assert (triton_rows.row_mixture(rows.spec, empty, whole) == 0).all()


def test_identical_sides_have_no_loss_and_no_gradient():
    logits = (20 * Draw((5,), vocab=TILE + 9).normal(5, TILE + 9)).float().double()
    sides = dict.fromkeys(("student", "teacher", "reference"), logits)
    for source in ("logits", "difference"):
        spec = RowSpec(teacher=source, reference=source, **EVERYTHING)
        rows = plain_rows(spec, sides)
        statistics = rows.statistics()
        for name in (*DIVERGENCES, "ref_kl"):
            assert named_statistics(statistics)[name].count_nonzero() == 0, name
            assert rows.gradient(statistics, name)[0].count_nonzero() == 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_is_rounded_to_nearest_even(dtype):
    rows = chunk(4, 333)
    statistics = rows.statistics()
    exact, _ = rows.gradient(statistics, "reverse_kl")
    assert torch.equal(rows.gradient(statistics, "reverse_kl", dtype)[0], exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_take_the_place_of_the_logits(dtype):
    rows = chunk(4, TILE + 3, dtype=dtype)
    statistics = rows.statistics()
    expected, mass = rows.gradient(statistics, "jsd", dtype)
    x = rows.inputs
    along = triton_rows.Coefficients(*(torch.zeros(4) for _ in range(7)))
    along = along._replace(jsd=torch.full((4,), 1 - rows.beta))
    found = triton_rows.row_grad(rows.spec, x, statistics, along, x.student)
    assert torch.equal(x.student, expected) and torch.equal(found, mass)


def test_memory_that_the_kernels_cannot_use_is_refused():
    rows = chunk(4, 33)
    x, statistics = rows.inputs, rows.statistics()
    along = triton_rows.Coefficients(*(torch.ones(4) for _ in range(7)))
    half = x.student.view(torch.bfloat16)[:, :33]
    with pytest.raises(ValueError, match="out: found memory of the student"):
        triton_rows.row_grad(rows.spec, x, statistics, along, half)
    with pytest.raises(ValueError, match="out: found shape"):
        triton_rows.row_grad(rows.spec, x, statistics, along, x.student[:, :32])
    for student, message in (
        (torch.zeros(4, 33), r"student: found strides \(33, 1\)"),
        (x.student.double(), "student: found torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_rows.row_partials(rows.spec, x._replace(student=student))
    with pytest.raises(ValueError, match="teacher: found shape"):
        triton_rows.row_partials(rows.spec, x._replace(teacher=x.teacher[:3]))


def test_rows_beyond_two_to_the_31_elements():
    """Memory that nobody touches costs nothing: 4 GiB of addresses, two rows of logits."""
    pitch, columns = 1 << 30, 21
    memory = torch.empty(2 * pitch + 32, dtype=torch.bfloat16)
    far = memory.as_strided((3, columns), (pitch, 1))
    far.copy_(Draw((3,), vocab=columns).normal(3, columns))
    near = pitched(far.clone(), far.dtype)
    spec = spec_of("jsd", "difference")
    x = chunk(3, columns).inputs._replace(reference=None, targets=None)
    one = torch.ones(3)

    def results(rows: Tensor) -> list[Tensor]:
        """Of all kernels; the gradient, written in place, comes last."""
        given = x._replace(student=rows, teacher=rows)
        parts = triton_rows.row_partials(spec, given)
        statistics = finish(spec, triton_rows.merge_tiles(spec, parts)[0], given)
        mixture = triton_rows.row_mixture(spec, given, statistics)
        statistics = finish_mixture(statistics, mixture, given)
        along = coefficients({"jsd": one}, statistics, jsd_complement=x.jsd_complement)
        errors = triton_rows.row_errors(spec, given, statistics, along)
        mass = triton_rows.row_grad(spec, given, statistics, along, rows)
        return [mixture, errors, mass, *triton_rows.masses(rows), rows.clone()]

    for found, expected in zip(results(far), results(near), strict=True):
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@dataclass
class Traffic:
    read: int = 0
    written: int = 0


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Bytes of every element that the interpreter loads and stores."""
    traffic = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.read += int(mask.data.sum()) * size
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.written += int(mask.data.sum()) * size
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        yield traffic


STORAGE = {  # of logits and of the gradient
    "fp32 logits": ("logits", torch.float32, torch.bfloat16),
    "fp32 logits, fp32 gradient": ("difference", torch.float32, torch.float32),
    "bf16 logits": ("logits", torch.bfloat16, torch.bfloat16),
    "bf16 difference": ("difference", torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("name", [*DIVERGENCES, "ref_kl"])
@pytest.mark.parametrize(("source", "dtype", "out"), STORAGE.values(), ids=STORAGE)
def test_traffic_is_that_of_the_model(name, source, dtype, out):
    """Per element: statistics read each side once, jsd twice; the gradient reads, writes once."""
    draw = Draw((2,), vocab=2 * TILE + 1)
    spec = spec_of(name, source)
    logits = {side: draw.normal(2, draw.vocab) for side in ("student", "teacher", "reference")}
    rows = stored_rows(spec, logits, dtype=dtype)
    elements = rows.stored["student"].numel()
    side = 2 * dtype.itemsize * elements
    with counted_traffic() as traffic:
        statistics = rows.statistics()
    assert traffic.read == pytest.approx(side * (2 if name == "jsd" else 1), rel=0.05)
    assert traffic.written <= 0.05 * side
    with counted_traffic() as traffic:
        gradient, _ = rows.gradient(statistics, name, out)
    assert traffic.read == pytest.approx(side, rel=0.05)
    assert traffic.written == pytest.approx(out.itemsize * elements, rel=0.05)
    with counted_traffic() as traffic:
        triton_rows.masses(gradient)
    assert traffic.read == pytest.approx(out.itemsize * elements, rel=0.05)


def test_a_gradient_does_not_read_a_teacher_that_no_term_has():
    draw = Draw((2,), vocab=2 * TILE + 1)
    logits = {side: draw.normal(2, draw.vocab) for side in SIDES}
    rows = plain_rows(RowSpec(teacher="logits"), logits)
    statistics = rows.statistics()
    with counted_traffic() as traffic:
        rows.gradient(statistics, "entropy")
    assert traffic.read == pytest.approx(4 * rows.stored["student"].numel(), rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"divergence": "jsd"}),
        (torch.bfloat16, {"precision": "difference"}),
        (torch.float32, {"sparse_tolerance": 0.01}),
        (torch.float32, {"kl_temperature": 0.7}),
        (torch.bfloat16, {"ref_coef": 0.1}),
    ],
)
def test_traffic_is_that_of_the_plan(dtype, options, monkeypatch):
    monkeypatch.setattr(precision, "TOLERANCE", 1.0)  # no plan knows what will be refined
    rows = 32
    draw = Draw((rows,), 8, TILE + 1)
    arguments = cast(draw.problem(bias=False), dtype) | options
    sides = 2
    if "ref_coef" in options:
        arguments["ref_hidden"], sides = draw.states().to(dtype), 3
    with counted_traffic() as traffic:
        result = solve(arguments, backend="triton")
    logits, gradient = 4 if "precision" not in options else 2, dtype.itemsize
    centres = 2 if "precision" in options else 0  # written before the GEMM, which reads them
    torch_passes = 2  # of the gradient: read by both products
    if "sparse_tolerance" in options:
        torch_passes += 1  # and for the masses of its rows
    if "kl_temperature" in options:
        torch_passes += 4  # a second gradient is added, and the sum read for its mass
    products = rows * draw.vocab * (sides * (1 + centres) * logits + torch_passes * gradient)
    # Where the errors are estimated, the compiler reads the difference once: the source says twice.
    twice = rows * draw.vocab * logits if centres else 0
    counted = traffic.read + traffic.written - twice
    assert counted + products == pytest.approx(result.plan.traffic_bytes, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (127, 513), (300, 1025)])
def test_masses(rows, columns, dtype):
    gradient = pitched(Draw((rows,), vocab=columns).normal(rows, columns), dtype)
    found = triton_rows.masses(gradient)
    for mass, of_plain, dim in zip(found, torch_masses(gradient), (0, 1), strict=True):
        expected = gradient.double().abs().sum(dim)
        assert relative_error(mass, expected) <= 1e-6
        assert relative_error(of_plain, expected) <= 1e-6
    assert torch.equal(found[0], triton_rows.masses(gradient)[0])


@triton.jit
def _elementwise(values, out, count: tl.constexpr, NAME: tl.constexpr):
    inside = tl.arange(0, count)
    x = tl.load(values + inside)
    if NAME == "expm1":
        y = triton_math.expm1(x)
    elif NAME == "log1p":
        y = triton_math.log1p(x)
    else:
        y = triton_math.tanh(x)
    tl.store(out + inside, y)


@pytest.mark.parametrize(
    ("name", "low", "high", "ulps"),
    [("expm1", -104.0, 88.0, 2), ("log1p", -1 + 2**-24, 1e38, 2), ("tanh", -30.0, 30.0, 3)],
)
def test_elementary_functions_to_a_few_ulps(name, low, high, ulps):
    def magnitudes(limit: float) -> Tensor:
        return torch.logspace(-30, torch.tensor(limit).log10().item(), 1 << 17).clamp(max=limit)

    values = torch.cat([-magnitudes(-low), magnitudes(high)])
    found = torch.empty_like(values)
    _elementwise[(1,)](values, found, values.numel(), name)
    exact = getattr(torch, name)(values.double())
    ulp = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
    assert ((found.double() - exact) / ulp).abs().max() <= ulps
