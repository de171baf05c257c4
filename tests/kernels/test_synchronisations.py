"""Places where the host would wait for a GPU, counted, against what the plan says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_problems import Draw, cast

import hsd_kernels
from hsd_kernels import fused_hsd_loss

pytest.importorskip("triton")

PACKAGE = Path(hsd_kernels.__file__).parent
# What reads a device's memory on the host. Values are checked on the CPU, where the plan lies.
WAITING = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")
ON_THE_CPU = ("checks.py", "plan.py", "ops.py")


@contextmanager
def counted() -> Iterator[list[str]]:
    """Places in the package that would wait."""
    places: list[str] = []

    def note() -> None:
        frame = sys._getframe(2)
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.name not in ON_THE_CPU:
            places.append(f"{path.name}:{frame.f_lineno}")

    def watched(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            note()
            return original(*arguments, **options)

        return call

    def copied(*arguments: Any, **options: Any) -> Any:
        if options.get("device") is not None:
            note()  # a number on its way to the device
        return new(*arguments, **options)

    new = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        patch.setattr(torch, "tensor", copied)
        yield places


def weights_per_term(draw: Draw) -> dict[str, Any]:
    """Rows with every set of sides."""
    return {
        "ref_hidden": draw.states(),
        "ref_coef": 0.3,
        "kl_weights": draw.masked(),
        "ref_weights": draw.masked().flip(0),
    }


ANY_DTYPE: list[dict[str, Any]] = [
    {},
    {"divergence": "jsd", "kl_temperature": 0.7, "logit_softcap": 30.0},
    {"sparse_tolerance": 0.01},
]
BF16: list[dict[str, Any]] = [
    {"precision": "difference"},
    {"precision": "difference", "sparse_tolerance": 0.01},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(o, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16) for o in ANY_DTYPE]
    + [(options, torch.bfloat16) for options in BF16],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_the_host_waits_as_often_as_the_plan_says(options, dtype):
    draw = Draw((40,))
    given = cast(draw.problem(bias=False) | weights_per_term(draw), dtype) | options
    leaves = {n: given[n].requires_grad_() for n in ("student_hidden", "weight")}
    budget = {"max_chunk_bytes": 12 * 5 * 4 * 37}
    fused_hsd_loss(**given | leaves, **budget, backend="triton")  # what is found out once
    with counted() as places:
        plan = fused_hsd_loss(**given | leaves, **budget, backend="triton").plan
    assert plan.chunks >= 4
    assert len(places) == plan.synchronisations, places
