"""Several processes do what one does."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from safetensors.torch import load_file

from hsd.config import ObjectiveConfig
from hsd.metrics import read_json_lines
from hsd.objective.step import accumulate_gradients
from hsd.policy.packing import TrainingRow
from hsd.policy.teachers import Policy
from hsd.run.lock import FolderLock

pytestmark = pytest.mark.slow

MakePolicy = Callable[..., Policy]
MakeRow = Callable[..., TrainingRow]

# Rows of rank 0 and of rank 1.
CASES = {"uneven": ([0, 1, 2], [3, 4]), "idle": ([0, 1, 2, 3, 4], []), "none": ([], [])}


@pytest.fixture(scope="module")
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy("llama-tied")


@pytest.fixture(scope="module")
def rows(make_row: MakeRow) -> list[TrainingRow]:
    return [make_row(n, context=n, response=2 + n) for n in range(5)]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, policy: Policy, rows: Sequence[TrainingRow]
) -> Path:
    """What the ranks wrote, case by case."""
    path = tmp_path_factory.mktemp("ranks")
    policy.model.save_pretrained(path / "model")
    policy.initial.save_pretrained(path / "initial")
    cases = {
        name: [[dataclasses.asdict(rows[n]) for n in share] for share in shares]
        for name, shares in CASES.items()
    }
    (path / "cases.json").write_text(json.dumps(cases))
    done = launch(Path(__file__).with_name("rank.py"), path, cache=path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.gradient
@pytest.mark.parametrize("case", ["uneven", "idle"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_has_the_gradient_of_all_rows(
    rank: int, case: str, folder: Path, policy: Policy, rows: list[TrainingRow]
) -> None:
    policy.model.zero_grad(set_to_none=True)
    accumulate_gradients(
        policy, rows, ObjectiveConfig(ref_coef=0.3), micro_batch_tokens=10_000, temperature=1.0
    )
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    found = load_file(folder / f"{case}-{rank}.safetensors")["gradient"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rank", [0, 1])
def test_without_any_row_every_rank_has_a_gradient_of_zero(rank: int, folder: Path) -> None:
    assert not load_file(folder / f"none-{rank}.safetensors")["gradient"].any()


@pytest.mark.parametrize("rank", [0, 1])
def test_gathered_shares_are_in_the_order_they_were_dealt_in(rank: int, folder: Path) -> None:
    gathered = json.loads((folder / f"uneven-{rank}.json").read_text())
    assert gathered == [f"uneven/{n}" for n in (0, 0, 1, 1, 2)]
    assert json.loads((folder / f"none-{rank}.json").read_text()) == []


def without_timings(path: Path) -> list[dict[str, Any]]:
    timings = {"kind", "seconds", "rollout_seconds", "update_seconds", "tokens_per_second"}
    timings |= {"peak_memory_bytes"}
    records = read_json_lines(path / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timings} for record in records]


FILTERED = {
    "rollout": {"questions_per_step": 3, "sampling_rounds": 4, "group_size": 3},
    "objective": {
        "group_filter": "mixed",
        "advantage": "standardised",
        "token_loss": "sequence_ratio",
        "normalisation": "token_global",
        "teacher": "ema",
    },
    "optimizer": {"updates_per_step": 2},
    "peers": {"source": "other_prompt"},
}


# With this seed a step without a group to learn from follows one with: momentum is at hand.
SPARSE = {
    "seed": 4,
    "steps": 6,
    "rollout": {"questions_per_step": 1, "group_size": 2},
    "objective": {
        "group_filter": "mixed",
        "advantage": "centred",
        "token_loss": "token_ratio",
        "teacher": "none",
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout": {"questions_per_step": 3}},
        {"rollout": {"questions_per_step": 1}},
        FILTERED,
        {"rollout": {"questions_per_step": 3}, "peers": {"source": "buffer"}},
        SPARSE,
        {
            "rollout": {"questions_per_step": 3},
            "adapter": {"rank": 2},
            "objective": {"teacher": "ema"},
        },
    ],
    ids=[
        "uneven ranks",
        "an idle rank",
        "filtered groups and two updates",
        "buffer",
        "sparse",
        "adapter",
    ],
)
def test_two_ranks_train_as_one(
    changes: dict[str, Any],
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
) -> None:
    recipe = make_recipe(tmp_path / "recipe", changes)
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch("-m", "hsd.train", recipe, "--run-dir", two, cache=tmp_path / "other-cache")
    assert done.returncode == 0, done.stderr
    assert run_hsd("train", recipe, "--run-dir", one) == 0
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    drawn = [
        [(r["step"], r["question"], r["index"], r["token_ids"], r["peers"]) for r in records]
        for records in (read_json_lines(path / "rollouts.jsonl") for path in (one, two))
    ]
    assert drawn[0] == drawn[1]
    for record, other in zip(without_timings(one), without_timings(two), strict=True):
        assert record.pop("split", None) == other.pop("split", None)
        for nested in ("correct_per_question", "pass_at"):
            assert record.pop(nested, None) == other.pop(nested, None)
        assert other == pytest.approx(record, rel=1e-3, abs=1e-5)
    assert done.stdout.count("change of avg@2 over training") == 1
    if changes is SPARSE:
        kept = [r["kept_share"] for r in without_timings(one) if "kept_share" in r]
        assert (1.0, 0.0) in itertools.pairwise(kept)


def test_a_folder_in_use_ends_both_ranks(tmp_path: Path, make_recipe: Callable[..., Path]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    done = launch(
        "-m", "hsd.train", make_recipe(tmp_path / "recipe"), "--run-dir", run, cache=tmp_path / "c"
    )
    assert done.returncode != 0
    assert "hsd: error: run_dir: found" in done.stderr
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_folder_that_another_job_trains_in_ends_both_ranks(
    tmp_path: Path, make_recipe: Callable[..., Path], run_hsd: Callable[..., int]
) -> None:
    run = tmp_path / "run"
    recipe = make_recipe(tmp_path / "recipe", {"warmup": {"steps": 0}, "checkpoint_every": 1})
    # What a run that was killed after its checkpoint leaves.
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("hsd.run.folder.RunFolder.finish", lambda _: None)
        assert run_hsd("train", recipe, "--run-dir", run) == 0
    with FolderLock(run) as lock:
        lock.take()
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        done = launch("-m", "hsd.train", "--resume", run, cache=tmp_path / "c")
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert done.returncode != 0
    assert done.stderr.count(f"run_dir: found {run} in use by process {os.getpid()} on") == 1
    assert "Traceback" not in done.stderr.partition("failed (exitcode")[0]
