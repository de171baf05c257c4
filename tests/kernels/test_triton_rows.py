"""The Triton row kernels, run by Triton's interpreter, against fp64 of the same logits."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_problems import Draw, likely_token, relative_error, scale_and_height, step
from torch import Tensor
from triton_problems import Rows, plain_rows, regime_logits, spec_of, stored_rows

from hsd_kernels.rows import RowSpec
from hsd_kernels.rows.triton_rows import TILE
from hsd_kernels.statistics import DIVERGENCES, named_statistics

FULL = bool(os.environ.get("HSD_FULL_GRID"))  # make test-kernels
EXAMPLES = 600 if FULL else 40
# The interpreter runs one program after the other: 300 rows take as long as six times 48.
MOST_ROWS = (48, 48, 48, 48, 48, 48, 48, 300) if FULL else (48,)
# The contract of fp32 logits: relative errors, of values from SMALLEST nats on.
GRADIENT, VALUE, SMALLEST = 1e-5, 1e-3, 1e-5
EPSILON = torch.finfo(torch.float32).eps
ROUNDINGS = 4  # scale, softcap and temperature are one each, and a subtraction
OFFSETS = ((0, 0), (40, 40), (-40, -40), (40, 0), (0, -40))  # of student and other, row by row
MUTATIONS = (lambda g: g * 0, lambda g: g * 1.05, lambda g: g.roll(1, 0))
STATISTICS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 1e-3),
    ("jsd", 1 - 1e-3),
    ("ref_kl", 0.5),
]


def assert_gradient(found: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    """By relative norm; a comparison that a wrong gradient would pass fails too.

    `floor` is the norm of an error that is not the kernel's.
    """
    allowed = GRADIENT + floor / max(expected.norm().item(), 1e-300)
    assert relative_error(found, expected) <= allowed
    if allowed < 0.02 and expected.norm() > 0:
        rows_differ = relative_error(expected.roll(1, 0), expected) > 2 * allowed
        for mutate in MUTATIONS[: 3 if rows_differ else 2]:
            assert relative_error(mutate(found), expected) > allowed


def contract_regime(kl: float, entropy: float, columns: int = 513) -> dict[str, Tensor]:
    draw = Draw(vocab=columns)
    noise, direction = (draw.normal(len(OFFSETS), columns) for _ in range(2))
    scale, height = scale_and_height(entropy, noise)
    student = scale * noise + height * likely_token(noise)
    other = student + step(kl, student, direction) * direction
    offsets = torch.tensor(OFFSETS, dtype=torch.float64)
    other = other + offsets[:, 1:]
    return {"student": student + offsets[:, :1], "teacher": other, "reference": other}


@pytest.mark.parametrize("source", ["logits", "difference"])
@pytest.mark.parametrize("entropy", [0.1, 3.0, 6.0])
@pytest.mark.parametrize("kl", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize(("name", "beta"), STATISTICS)
def test_contract(name, beta, kl, entropy, source):
    rows = plain_rows(spec_of(name, source), contract_regime(kl, entropy), beta=beta)
    statistics = rows.statistics()
    gradient, mass = rows.gradient(statistics, name)
    values, expected = rows.truth(name)
    assert_gradient(gradient, expected)
    assert relative_error(mass, expected.abs().sum(-1)) <= GRADIENT
    large = values >= SMALLEST
    found = named_statistics(statistics)[name].double()
    torch.testing.assert_close(found[large], values[large], rtol=VALUE, atol=0)


@pytest.mark.parametrize("above", [4.0, 8.0, 12.0])
@pytest.mark.parametrize(("name", "beta"), STATISTICS)
def test_contract_over_tiles_that_disagree(name, beta, above):
    """The student is surer of the other side's best token, which is in one of several tiles."""
    draw = Draw(vocab=2 * TILE + 77)
    other = 0.3 * draw.normal(2, draw.vocab)
    best = torch.nn.functional.one_hot(other.argmax(-1), draw.vocab)
    logits = {"student": other + above * best, "teacher": other, "reference": other}
    rows = plain_rows(spec_of(name, "logits"), logits, beta=beta)
    statistics = rows.statistics()
    values, expected = rows.truth(name)
    assert_gradient(rows.gradient(statistics, name)[0], expected)
    assert relative_error(named_statistics(statistics)[name], values) <= GRADIENT


@st.composite
def problems(draw: st.DrawFn) -> tuple[Rows, str, bool]:
    """Rows, a statistic of theirs, and whether their logits are the stored ones, unrounded."""
    columns = draw(st.one_of(st.integers(2, 300), st.sampled_from([1023, 2049, 4095, 4097, 5000])))
    most = draw(st.sampled_from(MOST_ROWS))
    count = draw(st.integers(0, most if columns <= 300 else most // 6))
    sources = st.sampled_from(["absent", "logits", "difference"])
    teacher, reference = draw(sources), draw(sources)
    flags = dict(zip(DIVERGENCES, draw(st.tuples(*[st.booleans()] * 3)), strict=True))
    exact = draw(st.booleans())
    own_temperature = not exact and draw(st.booleans())
    spec = RowSpec(
        teacher=teacher,
        reference=reference,
        **{name: wanted and teacher != "absent" for name, wanted in flags.items()},
        target=draw(st.booleans()),
        softcap=not exact and draw(st.booleans()),
        same_temperature=not own_temperature,
    )
    names = ["lse", "entropy"] + [name for name in DIVERGENCES if getattr(spec, name)]
    names += ["logprob"] * spec.target + ["ref_kl"] * (reference != "absent")
    seed = draw(st.integers(0, 2**31))
    logits = regime_logits(
        draw(st.sampled_from(["ordinary", "shifted", "identical", "one-hot", "wide"])),
        count,
        columns,
        kl=10 ** draw(st.floats(-4, 1)),
        entropy=draw(st.floats(0.1, 8)),
        offset=draw(st.sampled_from([-40.0, 0.0, 40.0])),
        seed=seed,
    )
    tokens = Draw((count,), vocab=columns, seed=seed)
    options: dict[str, object] = {"targets": tokens.targets()}
    if not exact:
        temperature = tokens.per_token(0.5, 2).float()
        other = tokens.per_token(0.5, 2).float() if own_temperature else temperature
        options |= {"temperature": temperature, "teacher_temperature": other, "scale": 0.8}
    if not exact and draw(st.booleans()):
        sides = ["student", *(s for s in ("teacher", "reference") if getattr(spec, s) == "logits")]
        options["biases"] = {side: tokens.normal(columns).float() for side in sides}
    rows = stored_rows(
        spec,
        logits,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        beta=draw(st.sampled_from([1e-3, 0.3, 0.5, 1 - 1e-3])),
        **options,
    )
    return rows, draw(st.sampled_from(names)), exact


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(problems())
@pytest.mark.timeout(0 if FULL else 300)
def test_generated_rows(problem):
    """The contract; beside it stands only what no kernel of fp32 logits could do better.

    That is rounding of transformed logits to fp32, measured on the truth itself, and where the
    sides are identical the rounding of the truth, in fp64.
    """
    rows, name, exact = problem
    statistics = rows.statistics()
    gradient, mass = rows.gradient(statistics, name)
    values, expected = rows.truth(name)
    nearby_values, nearby = (values, expected) if exact else rows.truth(name, rounded=True)
    found = named_statistics(statistics)[name].double()
    assert found.isfinite().all() and gradient.isfinite().all()
    own = 1e-15 * expected.numel() ** 0.5
    assert_gradient(gradient, expected, own + ROUNDINGS * (nearby - expected).norm().item())
    masses, nearby_masses = (g.abs().sum(-1) for g in (expected, nearby))
    own *= expected.shape[1] ** 0.5
    assert_gradient(mass, masses, own + ROUNDINGS * (nearby_masses - masses).norm().item())
    allowed = VALUE * values.abs().clamp(min=SMALLEST) + ROUNDINGS * (nearby_values - values).abs()
    if name in ("lse", "logprob", "entropy"):  # of which the contract says nothing
        largest = 2 * rows.inputs.student.float().abs().amax(-1)  # scale / temperature is below 2
        allowed = 1e-6 + EPSILON * largest + ROUNDINGS * (nearby_values - values).abs()
    assert ((found - values).abs() <= allowed).all()
