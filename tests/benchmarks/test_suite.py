"""From records to targets and tables, and the commands that write records, at toy sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import activations, case, divergences, exact, suite, synthetic, tables, targets
from benchmarks.methods import FLOOR, METHODS, OURS, Method, execute

ROOT = Path(__file__).parents[2]
TOY = synthetic.make(24, 16, 211)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache with toy states for work A."""
    monkeypatch.setenv("HSD_CACHE", str(tmp_path))
    activations.path().parent.mkdir(parents=True)
    names = ("student", "teacher", "head", "targets")
    named = {name: getattr(TOY, name).clone() for name in names}
    named |= {"reference": TOY.student * 0.9, "reference_head": TOY.head * 1.01}
    save_file(named, activations.path())
    return tmp_path


def benchmark(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_case_records_every_method_and_a_fault_is_a_row():
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    faulty = Method(name="faulty", package="torch", run=broken, losses=("forward_kl",))
    sparse = case.sparse_method(0.05)
    rows = case.measure(TOY, [FLOOR, OURS, faulty, sparse], exact.exact(TOY), rounds=3, sweep=1)
    found = {row.method: row for row in rows}
    assert found["faulty"].failure == "RuntimeError: no such kernel"
    assert all(len(row.seconds) == 3 for row in rows if row.method != "faulty")
    assert found[OURS.name].student_error <= 1e-4 < found[sparse.name].student_error
    assert 0 < found[sparse.name].columns_kept < 1
    assert 0 < found[sparse.name].mass_dropped <= 0.05


def test_a_sweep_keeps_the_fastest_chunk(monkeypatch):
    times = iter([9.0, 3.0, 9.0, 1.0, 9.0, 2.0])
    monkeypatch.setattr(case.timing, "seconds", lambda run: next(times))
    found = case._prepared(TOY, dataclasses.replace(FLOOR, chunks=(4, 8, 16)), None, 3)
    assert found["chunk"] == 8
    assert found["chunks_tried"] == {4: 3.0, 8: 1.0, 16: 2.0}
    assert found["first_seconds"] == 9.0


@pytest.mark.slow
def test_commands_write_records_that_make_a_page(cache, tmp_path):
    folder = tmp_path / "toy"
    toy = ["--tokens", "24", "--hidden", "16", "--vocab", "211"]
    few = ["--work", "A", "--dtype", "fp32", "--tokens", "24"]
    for name, module, arguments in (
        (
            "time-A-fp32",
            "case",
            [*few, "--rounds", "2", "--methods", FLOOR.name, OURS.name, "torch"],
        ),
        ("memory-A-fp32", "memory_case", [*few, "--methods", OURS.name, "torch"]),
        ("growth-tokens", "growth", ["--axis", "tokens", "--sizes", "24", "--rounds", "1"]),
        ("divergences", "divergences", [*toy, "--methods", OURS.name, "torch"]),
    ):
        ran = benchmark(module, *arguments, "--out", str(folder / f"{name}.json"))
        assert ran.returncode == 0, ran.stderr
    records = targets.read(folder)
    peaks = {row["method"]: row for row in records["memory-A-fp32"]["rows"]}
    assert all(row["allocated"] > 0 for row in peaks.values())
    page = tables.publish(folder, tmp_path / "docs")[0].read_text()
    assert all(f"## {name}" in page for name in records)
    assert f"{OURS.name} (hsd-kernels {OURS.version})" in page
    assert json.loads((tmp_path / "docs" / "toy.json").read_text()) == records
    assert {path.suffix for path in (tmp_path / "docs").iterdir()} == {".md", ".json", ".png"}


def test_the_kl_falls_with_the_share_of_coordinates():
    truths = [exact.exact(divergences.nearer(TOY, share)).loss for share in (1.0, 0.3, 0.05)]
    assert truths == sorted(truths, reverse=True)


# targets


def record(**seconds: list[float]) -> dict[str, object]:
    names = {"ours": targets.OURS, "floor": targets.FLOOR, "liger": targets.LIGER}
    rows = [
        {"method": names[name], "seconds": own, "student_error": 0.004, "head_error": 0.002}
        for name, own in seconds.items()
    ]
    return {"kind": "time", "rows": rows}


def verdict(records: targets.Records, what: str) -> targets.Verdict:
    return next(v for v in targets.verdicts(records) if v.target.what == what)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    # The machine was twice as slow in the second round: the ratio does not see it.
    records = {"time-A-bf16": record(ours=[1.1, 2.2, 1.1], floor=[1.0, 2.0, 1.0])}
    found = verdict(records, "A bf16: over the bare GEMMs")
    assert found.value == pytest.approx(1.1)
    assert found.met
    assert "met by 4.3%" in found.line


def test_a_missed_target_says_by_how_much():
    records = {"time-A-bf16": record(ours=[2.0], floor=[1.0], liger=[2.1])}
    assert "**missed** by 73.9%" in verdict(records, "A bf16: over the bare GEMMs").line
    assert verdict(records, "A bf16: Liger over ours").met is False
    assert verdict(records, "A bf16: gradient error").met is True


def test_what_was_not_measured_is_neither_met_nor_missed():
    found = targets.verdicts({})
    assert len(found) == len(targets.TARGETS)
    assert all(each.met is None and "not measured" in each.line for each in found)


def test_the_targets_are_shown_in_a_page_of_the_documentation(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    machine = {"cpu": "made", "capability": "x", "cores": 2, "threads": 2, "memory_gib": 1}
    shown = record(ours=[2.0], floor=[1.0]) | {"machine": machine | {"load": 0.1}}
    for _ in range(2):
        tables.summarise({"time-A-bf16": shown}, page, tmp_path / "benchmarks" / "targets.md")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert text.count("**missed** by 73.9%") == 1 and "not measured yet" in text
    assert "](benchmarks/targets.md)" in text and "](benchmarks/targets.json)" in text
    page.write_text("no lines")
    with pytest.raises(ValueError, match="found no lines"):
        tables.summarise({}, page, page)


# the suite


def test_a_recorded_benchmark_is_not_run_again(tmp_path):
    script = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('new')"
    module = tmp_path / "writes.py"
    module.write_text(script)
    (tmp_path / "old.json").write_text("old")
    benchmarks = [suite.Benchmark(name=name, command=("writes",)) for name in ("old", "fresh")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert suite.run(benchmarks, tmp_path, deadline=None) == []
    assert (tmp_path / "old.json").read_text() == "old"
    assert (tmp_path / "fresh.json").read_text() == "new"


def test_after_the_deadline_nothing_starts(tmp_path):
    benchmarks = [suite.Benchmark(name="late", command=("no_such_module",))]
    assert suite.run(benchmarks, tmp_path, deadline=0.0) == ["late"]


@pytest.mark.parametrize(
    "chosen", [suite.quick(), suite.targeted(), suite.full()], ids=["quick", "targets", "full"]
)
def test_a_record_belongs_to_one_benchmark(chosen):
    names = [each.name for each in chosen]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("chosen", [suite.targeted(), suite.full()], ids=["targets", "full"])
def test_a_suite_feeds_every_target(chosen):
    class Asked(dict):
        def __missing__(self, name):
            self.setdefault("asked", set()).add(name)
            raise KeyError(name)

    records = Asked()
    targets.verdicts(records)
    assert records["asked"] <= {each.name for each in chosen}


def test_fresh_leaves_leave_no_gradient_behind():
    execute(OURS, TOY, 8)
    assert TOY.student.grad is None
    assert TOY.head.grad is None


def test_quick_names_methods_that_there_are():
    known = {method.name for method in METHODS} | {targets.SPARSE, targets.SPARSE_FLOOR}
    asked = set(suite.QUICK_TIME) | set(suite.QUICK_PAIRS) | set(suite.QUICK_MEMORY)
    assert asked <= known
    parts = targets.OURS, targets.FLOOR, targets.SPARSE, targets.SPARSE_FLOOR, targets.LIGER
    assert set(parts) | {targets.PLAIN} <= set(suite.QUICK_TIME)
