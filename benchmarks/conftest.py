"""`pytest benchmarks` times every method on every case; see benchmarks/test_time.py."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tokens", type=int, default=2048, help="of each work (B: at most 512)")
    parser.addoption("--rounds", type=int, default=5, help="timed runs of each method")
