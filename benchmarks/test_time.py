"""Seconds of every method on every case, for pytest-benchmark.

    python -m pytest benchmarks/test_time.py [-k A-bf16] [--tokens 2048] [--benchmark-json FILE]

These are runs one after the other; ratios that hold come from `python -m benchmarks.case`, where
methods alternate and chunk sizes are swept.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.methods import METHODS, Method, execute
from benchmarks.work import DTYPES, LOSSES, Case, Work, load

CASES = [(work, dtype) for work in LOSSES for dtype in DTYPES]
MEASURED = [
    pytest.param(work, dtype, method, id=f"{work}-{dtype}-{method.name}")
    for work, dtype in CASES
    for method in METHODS
    if LOSSES[work] in method.losses
]
_held: dict[Case, Work] = {}


def held(case: Case) -> Work:
    """The work of a case; the one before is dropped."""
    if case not in _held:
        _held.clear()
        _held[case] = load(case)
    return _held[case]


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("work", "dtype", "method"), MEASURED)
def test_time(
    work: str, dtype: str, method: Method, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    if method.version is None:
        pytest.skip(f"{method.package} is not installed")
    tokens = request.config.getoption("--tokens")
    case = Case(work=work, dtype=dtype, tokens=min(tokens, 512) if work == "B" else tokens)
    given = held(case)
    chunk = method.candidates(given)[-1]
    benchmark.group = case.name
    benchmark.extra_info |= {"version": method.version, "chunk": chunk}
    rounds = request.config.getoption("--rounds")
    benchmark.pedantic(
        execute, args=(method, given, chunk), rounds=rounds, iterations=1, warmup_rounds=1
    )
