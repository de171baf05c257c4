"""Bad input that would reach torch or the ops, or be passed over: one clear error instead."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from kernel_problems import Draw, cast
from torch.testing._internal.distributed.fake_pg import FakeStore

from hsd_kernels import fused_hsd_loss, fused_token_loss, parity, plan, vocab_statistics

N, D, V = 6, 8, 37
HUGE = 10**400  # no float holds it


def problem() -> dict[str, Any]:
    return cast(Draw((N,), D, V).problem(bias=False), torch.float32)


def nested() -> torch.Tensor:
    parts = [torch.ones(3, D), torch.ones(2, D)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def forward_kl(statistics, inputs):
    return statistics["forward_kl"]


OF_THE_LOSS: dict[str, tuple[dict[str, Any], str]] = {
    # What is no plain tensor
    "sparse states": (
        {"student_hidden": torch.ones(N, D).to_sparse()},
        "student_hidden: found torch.sparse_coo, expected a dense tensor",
    ),
    "sparse head": ({"weight": torch.ones(V, D).to_sparse()}, "weight: found torch.sparse_coo"),
    "head of another layout": ({"weight": torch.ones(V, D).to_mkldnn()}, "weight: found"),
    "nested states": ({"student_hidden": nested()}, "student_hidden: found a nested tensor"),
    "nested teacher": ({"teacher_hidden": nested()}, "teacher_hidden: found a nested tensor"),
    "sparse weights": ({"token_weights": torch.ones(N).to_sparse()}, "token_weights: found"),
    "sparse targets": ({"targets": torch.ones(N).long().to_sparse()}, "targets: found"),
    # Numbers that float32 or an op cannot hold
    "scale without end": ({"logit_scale": HUGE}, "logit_scale: found 1000"),
    "infinite in float32": ({"logit_scale": 1e300}, "logit_scale: found 1e+300, expected a finite"),
    "temperature of 0 in float32": ({"temperature": 1e-46}, "temperature: found 1e-46, expected"),
    "softcap of 0 in float32": ({"logit_softcap": 1e-300}, "logit_softcap: found 1e-300"),
    "cap of 0 in float32": ({"token_kl_cap": 1e-46}, "token_kl_cap: found 1e-46"),
    "budget": ({"max_chunk_bytes": 2**63}, "max_chunk_bytes: found 9223372036854775808, expected"),
    "columns": (
        {"sparse_tolerance": 0.1, "sparse_max_columns": 2**63},
        "sparse_max_columns: found 9223372036854775808, expected at most",
    ),
    # Of token ids, the ends of int64
    "huge id": ({"targets": torch.full((N,), 2**62)}, "targets: found 4611686018427387904 at"),
    "least id": ({"targets": torch.full((N,), -(2**63))}, "targets: found -9223372036854775808 at"),
    # Options that do not apply
    "divergence without teacher": (
        {"teacher_hidden": None, "divergence": "reverse_kl", "entropy_coef": 0.1},
        "divergence: found a value, expected teacher_hidden beside it",
    ),
    "clip of arrays": (
        {"advantages": torch.ones(N), "clip_range": np.array([0.1, 0.2])},
        "clip_range: found array([0.1, 0.2]), expected a pair (low, high)",
    ),
    "expanded accumulator": (
        {"weight_grad_out": torch.zeros(1, D).expand(V, D)},
        "weight_grad_out: found an expanded tensor, whose elements share memory, expected",
    ),
}
OF_ONES_OWN: dict[str, tuple[dict[str, Any], str]] = {
    "a number as a name": ({"token_inputs": {3: torch.ones(N)}}, "token_inputs: found the name 3"),
    "no name": ({"token_inputs": {"": torch.ones(N)}}, "token_inputs: found the name ''"),
    "a name with a comma": (
        {"token_inputs": {"a,b": torch.ones(N)}},
        "token_inputs: found the name 'a,b', expected one without commas",
    ),
    "the weights": (
        {"token_inputs": {"token_weights": torch.ones(N)}},
        "token_inputs: found 'token_weights', expected it as an argument",
    ),
    "a list": ({"token_inputs": {"a": [1.0]}}, "token_inputs['a']: found list, expected a tensor"),
    "NaN": (
        {"token_inputs": {"upstream_lse": torch.full((N,), torch.nan)}},
        "token_inputs['upstream_lse']: found nan at token 0, expected finite values",
    ),
    "one argument": (
        {"token_loss": lambda statistics: statistics["lse"]},
        "token_loss: found a function of (statistics), expected one of two arguments",
    ),
    "integers": (
        {"token_loss": lambda s, i: (s["lse"] > 0).long()},
        "token_loss: found torch.int64, expected a floating-point dtype",
    ),
    "a value for all tokens": (
        {"token_loss": lambda s, i: s["lse"][:1]},
        "token_loss: found (1,) for 2 tokens, expected a tensor of shape (2,)",
    ),
    "a mixture that nobody reads": (
        {"jsd_beta": 0.3},
        "jsd_beta: found 0.3, expected a token_loss that reads 'jsd'",
    ),
}
OF_STATISTICS: dict[str, tuple[dict[str, Any], str]] = {
    "a number": ({"statistics": 5}, "statistics: found 5, expected a sequence of names"),
    "none": ({"statistics": ()}, "statistics: found none, expected a sequence of names"),
    "a number among names": ({"statistics": ("lse", 3)}, "statistics: found 3, expected some of"),
    "a mixture that nobody reads": (
        {"jsd_beta": 0.3},
        "jsd_beta: found 0.3, expected statistics with 'jsd'",
    ),
    "a sparse backward of the reference": (
        {"sparse_tolerance": 0.1, "backend": "reference"},
        "sparse_tolerance: found a value, expected none with backend='reference'",
    ),
    "an id that is none": (
        {"targets": torch.full((N,), V), "backend": "reference"},
        "targets: found 37 at token 0, expected 0 to 36",
    ),
}


def refused(message: str, call: Any, /, **arguments: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)) as raised:
        call(**arguments)
    assert "found" in str(raised.value) and "expected" in str(raised.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("options", "message"), OF_THE_LOSS.values(), ids=OF_THE_LOSS)
def test_of_the_loss(options, message, backend):
    refused(message, fused_hsd_loss, **problem() | options | {"backend": backend})


@pytest.mark.parametrize(("options", "message"), OF_ONES_OWN.values(), ids=OF_ONES_OWN)
def test_of_a_loss_of_ones_own(options, message):
    refused(message, fused_token_loss, **problem() | {"token_loss": forward_kl} | options)


@pytest.mark.parametrize(("options", "message"), OF_STATISTICS.values(), ids=OF_STATISTICS)
def test_of_statistics(options, message):
    refused(message, vocab_statistics, **problem() | options)


def test_names_of_statistics_may_be_any_iterable():
    found = vocab_statistics(**problem(), statistics=(name for name in ("lse", "entropy")))
    assert found.lse.shape == found.entropy.shape == (N,)


@pytest.fixture(scope="module")
def group():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


OF_A_GROUP: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"top_k": 2}, "top_k: found 2, expected 0 with process_group"),
    "the reference": (
        {"backend": "reference"},
        "process_group: found a value, expected none with backend='reference'",
    ),
    "a head that is cut elsewhere": (
        {"teacher_weight": torch.ones(V + 1, D)},
        f"teacher_weight: found {V + 1} rows, expected {V}: with process_group every head is",
    ),
    "no column in use": ({"vocab_size": 0}, "vocab_size: found 0, expected at least 1"),
    "columns beyond all shards": (
        {"vocab_size": 1000},
        "vocab_size: found 1000, expected 1 to",
    ),
}


@pytest.mark.parametrize(("options", "message"), OF_A_GROUP.values(), ids=OF_A_GROUP)
def test_of_heads_that_are_sharded(group, options, message):
    refused(message, fused_hsd_loss, **problem() | options, process_group=group)


def test_of_statistics_over_a_group(group):
    message = "process_group: found a value, expected none with backend='reference'"
    options = {"process_group": group, "backend": "reference"}
    refused(message, vocab_statistics, **problem() | options)


def test_of_parity():
    given = problem()
    del given["targets"]
    flag = "tail_bucket: found 1, expected True or False"
    refused(flag, parity.top_k_divergence, **given, k=3, tail_bucket=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_chunk_bytes": "1G"}, "max_chunk_bytes: found str, expected a number of bytes"),
        ({"max_chunk_bytes": -1}, "max_chunk_bytes: found -1, expected > 0 bytes"),
        ({"compiled": 1}, "compiled: found 1, expected True or False"),
        ({"rows": 2**63}, "rows: found 9223372036854775808, expected at most"),
    ],
)
def test_of_a_plan(options, message):
    refused(message, plan, **{"rows": 10, "hidden_size": 8, "vocab_size": 100, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_states_and_heads_that_are_not_finite_show_in_the_loss(value, name, dtype):
    """Also where bf16 logits are refined and estimated."""
    given = cast(problem(), dtype)
    given[name] = given[name].clone()
    given[name][0, 0] = value
    given["student_hidden"] = given["student_hidden"].requires_grad_()
    assert fused_hsd_loss(**given).loss.isnan()
