"""Bad input: one error that names the argument, what was found, and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from kernel_problems import Arguments, Draw, cast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hsd_kernels import fused_hsd_loss, plan

N, D, V = 6, 8, 37


def arguments(**changed: Any) -> Arguments:
    draw = Draw((N,), D, V)
    problem = draw.problem() | {"ref_hidden": draw.states(), "advantages": draw.per_token(-1, 1)}
    return {**cast(problem, torch.float32), **changed}


def bare() -> Arguments:
    given = arguments()
    return {n: given[n] for n in ("student_hidden", "weight")} | {"teacher_hidden": None}


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def learns(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def one_bad(value: float, at: int = 2) -> torch.Tensor:
    return torch.ones(N).index_fill(0, torch.tensor(at), value)


WRONG_SHAPES = {
    "student_hidden": [(tensor(D), "(..., D)"), (tensor(N, 0), "D > 0")],
    "teacher_hidden": [
        (tensor(N + 1, D), f"({N},) + (D,)"),
        (tensor(N, D + 1), "or give teacher_weight"),
    ],
    "ref_hidden": [(tensor(2, 3, D), f"({N},) + (D,)"), (tensor(N, 2), "or give ref_weight")],
    "weight": [(tensor(V, D + 1), f"(V, {D})"), (tensor(V), f"(V, {D})"), (tensor(0, D), "(V, ")],
    "bias": [(tensor(V - 1), f"({V},)"), (tensor(1, V), f"({V},)")],
    "teacher_weight": [(tensor(V, D + 1), f"(V, {D})"), (tensor(V - 1, D), f"at least {V}")],
    "ref_weight": [(tensor(V, D + 1), f"(V, {D})"), (tensor(V - 1, D), f"at least {V}")],
    "targets": [(tensor(N - 1, dtype=torch.int64), f"({N},)")],
    "token_weights": [(tensor(N, 1), f"({N},)")],
    "kl_weights": [(tensor(1), f"({N},)")],
    "pg_weights": [(tensor(), f"({N},)")],
    "ref_weights": [(tensor(N + 1), f"({N},)")],
    "advantages": [(tensor(N - 1), f"({N},)")],
    "old_logprobs": [(tensor(N - 1), f"({N},)")],
    "temperature": [(tensor(1), f"({N},)")],
    "kl_temperature": [(tensor(N, 1), f"({N},)")],
    "teacher_temperature": [(tensor(N + 1), f"({N},)")],
}
WRONG_TYPES = {
    "student_hidden": [
        (tensor(N, D, dtype=torch.int64), "one of torch.float32"),
        ([[1.0]], "tensor"),
    ],
    "teacher_hidden": [(tensor(N, D, dtype=torch.bfloat16), "torch.float32 as student_hidden")],
    "ref_hidden": [(tensor(N, D, dtype=torch.float64), "torch.float32 as student_hidden")],
    "weight": [
        (tensor(V, D, dtype=torch.bfloat16), "torch.float32 as student_hidden"),
        (3, "tensor"),
    ],
    "bias": [(tensor(V, dtype=torch.float16), "torch.float32 as student_hidden"), (0.0, "tensor")],
    "teacher_weight": [(tensor(V, D, dtype=torch.bfloat16), "torch.float32")],
    "targets": [(tensor(N), "torch.int64"), (tensor(N, dtype=torch.int32), "torch.int64")],
    "token_weights": [(tensor(N, dtype=torch.bool), "floating-point"), (1.0, "tensor")],
    "advantages": [(tensor(N, dtype=torch.int64), "floating-point")],
    "temperature": [("1", "number"), (True, "number"), (None, "number")],
    "logit_scale": [("1", "number"), (tensor(), "number")],
    "logit_softcap": [("30", "number")],
    "vocab_size": [(30.0, "int"), (True, "int")],
    "kl_coef": [("1", "number")],
    "clip_range": [(0.2, "(low, high)"), ((0.2,), "(low, high)"), (("a", "b"), "number")],
    "max_chunk_bytes": [("1G", "number")],
    "process_group": [("world", "ProcessGroup"), (-100, "ProcessGroup")],  # as non-members get
    "validate": [("yes", "True or False")],
}
OUT_OF_RANGE = {
    "vocab_size": [(0, f"1 to {V}"), (V + 1, f"1 to {V}"), (-1, f"1 to {V}")],
    "temperature": [(0.0, "> 0"), (-1.0, "> 0"), (torch.nan, "finite"), (one_bad(0.0), "> 0")],
    "kl_temperature": [(0.0, "> 0"), (one_bad(-1.0), "> 0")],
    "teacher_temperature": [(torch.inf, "finite"), (one_bad(torch.nan), "finite")],
    "logit_scale": [(torch.inf, "finite")],
    "logit_softcap": [(0.0, "> 0"), (-30.0, "> 0")],
    "token_kl_cap": [(0.0, "> 0"), (torch.nan, "finite")],
    "clip_range": [((-0.1, 0.2), "low"), ((1.1, 0.2), "low"), ((0.2, -0.1), "high")],
    "kl_coef": [(torch.nan, "finite")],
    "ref_coef": [(torch.inf, "finite")],
    "pg_coef": [(torch.nan, "finite")],
    "entropy_coef": [(torch.nan, "finite")],
    "divergence": [("kl", "'forward_kl', 'reverse_kl', 'jsd'")],
    "max_chunk_bytes": [(0, "> 0"), (100, "at least")],
    "precision": [("fp8", "'fp32_logits'")],
    "backend": [("cuda", "'cpu'")],
    "token_weights": [(one_bad(torch.nan), "finite"), (one_bad(torch.inf), "finite")],
    "kl_weights": [(one_bad(torch.nan), "finite")],
    "ref_weights": [(one_bad(torch.nan), "finite")],
    "pg_weights": [(one_bad(torch.nan), "finite")],
    "advantages": [(one_bad(torch.nan), "finite")],
    "old_logprobs": [(one_bad(-torch.inf), "finite")],
    "targets": [
        (one_bad(V).long(), f"0 to {V - 1}"),
        (one_bad(-100).long(), f"0 to {V - 1}"),
    ],
}


def flat(table: dict[str, list[tuple[Any, str]]]) -> list[Any]:
    return [
        pytest.param(name, value, expected, id=f"{name} {index}")
        for name, pairs in table.items()
        for index, (value, expected) in enumerate(pairs)
    ]


def refused(error: type[Exception], name: str, expected: str, given: Arguments) -> str:
    """The message, which starts with the argument's name, and says what was found and expected."""
    with pytest.raises(error, match=rf"^[\w, ]*\b{name}\b.*: ") as raised:
        fused_hsd_loss(**given)
    message = str(raised.value)
    assert "found" in message
    assert re.search(r"expected .*" + re.escape(expected), message), message
    return message


@pytest.mark.parametrize(("name", "value", "expected"), flat(WRONG_SHAPES))
def test_wrong_shape(name, value, expected):
    message = refused(ValueError, name, expected, arguments(**{name: value}))
    assert (
        str(tuple(value.shape)) in message or str(value.shape[-1]) in message or "rows" in message
    )


@pytest.mark.parametrize(("name", "value", "expected"), flat(WRONG_TYPES))
def test_wrong_type(name, value, expected):
    refused(TypeError, name, expected, arguments(**{name: value}))


@pytest.mark.parametrize(("name", "value", "expected"), flat(OUT_OF_RANGE))
def test_value_out_of_range(name, value, expected):
    refused(ValueError, name, expected, arguments(**{name: value}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("teacher_hidden", (N, D)),
        ("ref_hidden", (N, D)),
        ("weight", (V, D)),
        ("bias", (V,)),
        ("teacher_weight", (V, D)),
        ("token_weights", (N,)),
        ("temperature", (N,)),
    ],
)
def test_other_device(name, shape):
    refused(ValueError, name, "cpu", arguments(**{name: tensor(*shape, device="meta")}))


def test_the_cpu_backend_refuses_tensors_that_are_elsewhere():
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments().items()
    }
    refused(ValueError, "backend", "CPU tensors", meta | {"backend": "cpu"})


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden", "weight", "bias"])
def test_a_dtensor_is_refused_with_the_remedy(name, mesh):
    given = arguments()
    given[name] = distribute_tensor(given[name], mesh)
    message = refused(TypeError, name, "plain tensor", given)
    assert "unshard" in message
    assert "full_tensor" in message


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("kl_coef", 0.5, "teacher_hidden"),
        ("kl_weights", tensor(N), "teacher_hidden"),
        ("token_kl_cap", 1.0, "teacher_hidden"),
        ("teacher_weight", tensor(V, D), "teacher_hidden"),
        ("teacher_bias", tensor(V), "teacher_weight"),
        ("teacher_temperature", 0.9, "teacher_hidden"),
        ("ref_coef", 0.1, "ref_hidden"),
        ("ref_weights", tensor(N), "ref_hidden"),
        ("ref_weight", tensor(V, D), "ref_hidden"),
        ("ref_bias", tensor(V), "ref_weight"),
        ("advantages", tensor(N), "targets"),
        ("old_logprobs", tensor(N), "advantages"),
        ("pg_weights", tensor(N), "advantages"),
        ("pg_coef", 0.5, "advantages"),
        ("clip_range", (0.1, 0.3), "advantages"),
        ("kl_temperature", 0.9, "teacher_hidden or ref_hidden"),
    ],
)
def test_an_option_without_its_input(name, value, needed):
    refused(ValueError, name, needed, bare() | {"entropy_coef": 0.1, name: value})


def test_no_term_at_all():
    refused(ValueError, "teacher_hidden", "at least one term", bare())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("jsd_beta", -0.1, "0 to 1"),
        ("jsd_beta", 1.1, "0 to 1"),
        ("jsd_beta", torch.nan, "finite"),
        ("jsd_convention", "other", "'interior'"),
    ],
)
def test_jsd_option_out_of_range(name, value, expected):
    refused(ValueError, name, expected, arguments(**{"divergence": "jsd", name: value}))


@pytest.mark.parametrize("beta", [0, 1])
def test_interior_jsd_has_no_ends(beta):
    given = arguments(divergence="jsd", jsd_beta=beta, jsd_convention="interior")
    refused(ValueError, "jsd_beta", "0 < jsd_beta < 1", given)


@pytest.mark.parametrize("option", [{"jsd_beta": 0.3}, {"jsd_convention": "scaled"}])
def test_a_jsd_option_without_the_jsd(option):
    refused(ValueError, next(iter(option)), "divergence='jsd'", arguments(**option))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_hidden", learns(N, D)),
        ("ref_hidden", learns(N, D)),
        ("teacher_weight", learns(V, D)),
        ("ref_weight", learns(V, D)),
        ("token_weights", learns(N)),
        ("advantages", learns(N)),
        ("temperature", learns(N)),
    ],
)
def test_a_constant_that_requires_grad(name, value):
    refused(ValueError, name, "detached", arguments(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sparse_tolerance", 0.0, "0 < value < 1"),
        ("sparse_tolerance", 1.0, "0 < value < 1"),
        ("sparse_max_columns", 10, "sparse_tolerance"),
        ("top_k", -1, "at least 0"),
        ("top_k", V + 1, f"at most {V}"),
        ("weight_grad_out", tensor(V, D + 1), str((V, D))),
        ("weight_grad_out", tensor(V, D).bfloat16(), "torch.float32"),
    ],
)
def test_an_option_that_does_not_fit(name, value, expected):
    refused(ValueError, name, expected, arguments(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("sparse_tolerance", 0.01), ("top_k", 2), ("weight_grad_out", tensor(V, D))],
)
def test_the_reference_refuses_what_it_has_not(name, value):
    refused(
        ValueError, name, "backend='reference'", arguments(**{name: value, "backend": "reference"})
    )


def test_bad_values_in_rows_without_weight_are_accepted():
    given = arguments(
        token_weights=one_bad(0.0),
        targets=one_bad(-100).long(),
        advantages=one_bad(torch.nan),
        kl_weights=one_bad(torch.inf),
    )
    assert fused_hsd_loss(**given).loss.isfinite()


def test_the_error_names_the_token():
    refused(ValueError, "advantages", "finite", arguments(advantages=one_bad(torch.nan, at=4)))
    with pytest.raises(ValueError, match="nan at token 4"):
        fused_hsd_loss(**arguments(advantages=one_bad(torch.nan, at=4)))


def test_plan_refuses_a_budget_below_one_row():
    with pytest.raises(ValueError, match=r"^max_chunk_bytes: found 1000, expected at least 8000"):
        plan(10, 8, 1000, max_chunk_bytes=1000)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": -1}, ValueError, "rows: found -1, expected at least 0"),
        ({"rows": 8.5}, TypeError, "rows: found float, expected an integer"),
        ({"hidden_size": 0}, ValueError, "hidden_size: found 0"),
        ({"vocab_size": 0}, ValueError, "vocab_size: found 0"),
        ({"temperatures": 3}, ValueError, "temperatures: found 3, expected 1 or 2"),
        ({"copied_heads": -1}, ValueError, "copied_heads: found -1"),
        ({"teacher": "no"}, TypeError, "teacher: found 'no', expected True or False"),
        ({"backend": "reference"}, ValueError, "backend: found 'reference', expected one of 'cpu'"),
        ({"precision": "fp8"}, ValueError, "precision: found 'fp8'"),
    ],
)
def test_plan_refuses_what_it_cannot_plan(changes, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        plan(**{"rows": 10, "hidden_size": 8, "vocab_size": 100, **changes})
