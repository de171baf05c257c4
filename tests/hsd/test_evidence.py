"""The command behind docs/evidence.md: it resumes, says what is missing, judges by its rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evidence.__main__ import locked, main, run
from benchmarks.evidence.plan import Comparison, load_plan
from benchmarks.evidence.verdicts import (
    FAILS,
    HOLDS,
    NOT_RUN,
    OPEN,
    credit_verdicts,
    interval,
    learning_verdict,
)
from hsd.report.runs import Run

ROOT = Path(__file__).parents[2]


def made_run(seed: int, after: Sequence[int], *, seconds: float = 1.0) -> Run:
    """Evaluated at 2 of 8 on every question, then as given; two steps."""
    counts = ([2] * len(after), list(after))
    return Run(
        name="run",
        path=Path("run"),
        config={"seed": seed, "steps": 2},
        steps=[{"step": step, "update_seconds": seconds} for step in (1, 2)],
        evaluations=[
            {"step": step, "samples": 8, "correct_per_question": each}
            for step, each in zip((0, 2), counts, strict=True)
        ],
    )


def judged(claim: Mapping[str, str], **runs: Sequence[Run]) -> tuple[str, str]:
    comparison = Comparison(claim="", better="a", **claim)  # type: ignore[arg-type]
    verdict = learning_verdict(comparison, runs, seeds=2)
    return verdict.verdict, verdict.numbers


def test_learning_verdicts() -> None:
    high = [made_run(seed, [6, 7] * 20) for seed in (0, 1)]
    low = [made_run(seed, [3, 4] * 20) for seed in (0, 1)]
    assert judged({"worse": "b"}, a=high, b=low)[0] == HOLDS
    assert judged({"worse": "b"}, a=low, b=high)[0] == FAILS
    assert judged({"worse": "b"}, a=high, b=high)[0] == OPEN
    assert judged({"worse": "base"}, a=high) == (
        HOLDS,
        "avg@8 0.812 against 0.250, difference 0.562 ± 0.020",
    )
    assert judged({"worse": "b"}, a=high[:1], b=low) == (NOT_RUN, "1 of 2 seeds")
    # pass@8 is 1 before and 1 after
    assert judged({"worse": "base", "measure": "pass"}, a=high)[0] == OPEN


def test_at_equal_time_the_slow_one_counts_as_far_as_it_got() -> None:
    fast = [made_run(seed, [3, 4] * 20) for seed in (0, 1)]
    slow = [made_run(seed, [6, 7] * 20, seconds=2.0) for seed in (0, 1)]
    assert judged({"worse": "b"}, a=slow, b=fast)[0] == HOLDS
    assert judged({"worse": "b", "equal": "time"}, a=slow, b=fast)[0] == FAILS


def test_seeds_that_disagree_leave_a_claim_open() -> None:
    """+0.5 and -0.3 on all of 40 questions: no spread over questions of the mean over seeds."""
    found = interval(torch.tensor([[0.5] * 40, [-0.3] * 40]))
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(12.71 * (0.8 / 2**0.5) / 2**0.5)
    more_seeds = interval(torch.tensor([[0.5, 0.1], [0.5, 0.1], [0.5, 0.1]]))
    assert more_seeds.half_width == pytest.approx(1.96 * (0.4 / 2**0.5) / 2**0.5)


def context(
    peak: float, floor: float | None, share: float, *, decay: int | None = 7
) -> dict[str, Any]:
    return {
        "peak": {"mean": peak, "half_width": 0.1},
        "floor": {"mean": floor, "half_width": None if floor is None else 0.01},
        "decay": decay,
        "shares": [{"share": share, "half_width": 0.05}],
    }


def verdicts(failed: int = 200, **contexts: dict[str, Any]) -> list[str]:
    made = {"answer_peer": context(0.9, 0.05, 0.6), "answer": context(0.1, 0.08, 0.1)}
    made["other_prompt"] = context(0.5, 0.2, 0.3)
    summary = {"failed_with_peer": failed, "contexts": {**made, **contexts}}
    return [verdict.verdict for verdict in credit_verdicts(summary)]


def test_credit_verdicts() -> None:
    # the answer's interval, 0.02 ± 0.1 above its floor, reaches beyond 0.1
    assert verdicts() == [HOLDS, HOLDS, OPEN, HOLDS, HOLDS, HOLDS]
    assert verdicts(failed=199) == [OPEN] * 6
    assert [each.verdict for each in credit_verdicts(None)] == [NOT_RUN] * 6
    assert verdicts(answer=context(-0.2, 0.08, 0.55))[2:5] == [HOLDS, HOLDS, OPEN]
    assert verdicts(answer=context(1.5, 0.05, 0.9))[2:5] == [FAILS, FAILS, FAILS]
    late = context(0.01, 0.5, 0.1, decay=None)
    assert verdicts(answer_peer=late) == [FAILS, FAILS, OPEN, OPEN, OPEN, FAILS]
    short = context(0.9, None, 0.6, decay=None)
    assert verdicts(answer_peer=short)[:2] == [OPEN, OPEN]


@pytest.mark.parametrize(("name", "page"), [("plan", "evidence"), ("sparse", "sparse-learning")])
def test_the_plans_that_ship_are_whole(name: str, page: str) -> None:
    plan = load_plan(ROOT / "benchmarks" / "evidence" / f"{name}.toml")
    order = plan.order()
    assert len(order) == sum(len(job.seeds) for job in plan.jobs) == len(set(map(str, order)))
    assert all((ROOT / job.recipe).is_file() for job in plan.jobs)
    assert plan.folder == Path("runs") / page and plan.page == Path("docs") / f"{page}.md"
    assert plan.records == Path("benchmarks/evidence/records") / page


@pytest.fixture
def plan_file(tmp_path: Path, make_recipe: Callable[..., Path]) -> Path:
    recipe = make_recipe(tmp_path / "recipe", {"steps": 1})
    path = tmp_path / "plan.toml"
    path.write_text(
        f"""folder = "{tmp_path}/runs"
records = "{tmp_path}/records"
page = "{tmp_path}/docs/evidence.md"
title = "What holds"
about = "Made."
seeds = 1
[[jobs]]
kind = "credit"
name = "credit"
recipe = "{recipe}"
groups = 2
contexts = ["answer_peer", "answer", "other_prompt"]
[[jobs]]
kind = "train"
name = "hsd"
recipe = "{recipe}"
seeds = [0, 1]
[[jobs]]
kind = "train"
name = "broken"
recipe = "{tmp_path}/gone.toml"
[[claims]]
claim = "it learns"
better = "hsd"
worse = "base"
[[claims]]
claim = "it is better"
better = "hsd"
worse = "broken"
"""
    )
    return path


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (("CXX", "none"), ("HF_HUB_OFFLINE", "1"), ("PYTHONPATH", str(ROOT))):
        monkeypatch.setenv(name, value)
    assert os.environ["HSD_CACHE"].startswith(str(tmp_path))
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
def test_it_runs_what_is_missing_and_nothing_twice(tmp_path: Path, plan_file: Path) -> None:
    assert main([str(plan_file), "--page-only"]) == 0
    page = tmp_path / "docs" / "evidence.md"
    assert page.read_text().count(f"| {NOT_RUN} |") >= 8 + 3  # claims and runs
    cut_off = tmp_path / "runs" / "hsd-seed1"
    cut_off.mkdir(parents=True)
    (cut_off / "metrics.jsonl").write_text("")
    assert main([str(plan_file)]) == 1  # the broken one
    text = page.read_text()
    assert "| broken-seed0 | not run yet |" in text
    assert "| it is better | not run yet | - |" in text
    assert "| it learns | not run yet" not in text
    assert f"| {OPEN} | 2 failing rollouts with a peer |" in text or "failing rollouts" in text
    for image in ("evidence-credit.png", "evidence-curves.png"):
        assert f"images/{image}" in text and (page.parent / "images" / image).is_file()
    minutes = json.loads((tmp_path / "records" / "minutes.json").read_text())
    assert set(minutes) == {"credit-seed0", "hsd-seed0", "hsd-seed1"}
    shutil.rmtree(tmp_path / "runs")  # as in another clone: the records are enough
    assert main([str(plan_file)]) == 1
    assert page.read_text() == text
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


def test_a_run_that_was_told_to_stop_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan_file: Path
) -> None:
    plan = load_plan(plan_file)
    plan.folder.mkdir()

    def stopped(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        folder = plan.folder / "hsd-seed0"
        folder.mkdir()
        (folder / "config.json").write_text('{"config": {"seed": 0, "steps": 1}}')
        (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", stopped)
    assert not run(plan, plan.job("hsd"), 0)
    assert not plan.job("hsd").complete(plan.records, 0)


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"), pytest.raises(SystemExit, match="another process"):  # noqa: SIM117
        with locked(tmp_path / "lock"):
            pass


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "hsd"', 'name = "credit"', "different names"),
        ('better = "hsd"', 'better = "gone"', "found 'gone'"),
        ('worse = "base"', 'worse = "credit"', "found 'credit'"),
        ("groups = 2", "group = 2", "group"),
        ("groups = 2", "seeds = [1]", "expected 0 for credit"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(old: str, new: str, said: str, plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        load_plan(plan_file)
