"""`python -m benchmarks.gpu` without a GPU, and at toy size under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_in_one_line():
    ran = run()
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "no CUDA or ROCm device here: nothing to measure\n"


@pytest.mark.slow
def test_every_installed_rival_is_measured(tmp_path):
    file = tmp_path / "rows.json"
    sizes = ["--tokens", "8", "--hidden", "16", "--vocab", "101", "--rounds", "1"]
    ran = run(*sizes, "--json", str(file), TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stderr
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert {"hsd_kernels", "torch", "torch.compile"} <= rows.keys()
    assert rows["hsd_kernels"]["gradient_error"] <= 5e-3 < rows["torch"]["gradient_error"]
    assert all(row["milliseconds"] > 0 for row in rows.values())
