"""The machine code of the Triton row kernels, for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
KERNELS = {"partials", "mixture", "gradient", "column_mass", "column_error", "merge"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # six targets, minutes on a busy machine
def test_no_spill_and_no_narrow_load_of_row_data(tmp_path):
    """In a process of its own: in this one, triton interprets. The vocabulary is odd."""
    report = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled", "--json", str(report)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert report.is_file(), done.stderr
    kernels = json.loads(report.read_text())["kernels"]
    faults = {(k["target"], k["kernel"], k["variant"]): k["faults"] for k in kernels}
    assert {name: found for name, found in faults.items() if found} == {}
    assert done.returncode == 0
    for target in TARGETS:
        assert {k["kernel"] for k in kernels if k["target"] == target} == KERNELS
    assert all(k["spilled_bytes"] == 0 < k["registers"] for k in kernels)
    streaming = [k for k in kernels if k["kernel"] != "merge"]  # which reads statistics, no rows
    assert all(k["expected_load_bits"] >= 128 for k in streaming)
    for each in streaming:  # in every streaming loop, all of the rows' data in whole loads
        assert each["body_load_bits"]
        assert all(n and n % each["expected_load_bits"] == 0 for n in each["body_load_bits"])
    looping = [k for k in kernels if k["kernel"].startswith("column_")]
    assert {len(k["body_load_bits"]) for k in looping} == {1}
