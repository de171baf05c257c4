"""A rank that dies ends the job at once, and any number of ranks goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hsd.distributed.checkpoint import whole_checkpoints
from hsd.metrics import read_json_lines

pytestmark = pytest.mark.slow

CHANGES = {
    "steps": 4,
    "checkpoint_every": 2,
    "rollout": {"questions_per_step": 3},
    "objective": {
        "teacher": "ema",
        "teacher_decay": 0.9,
        "ref_refresh_every": 2,
        "ref_refresh_decay": 0.5,
        "ref_coef": 0.1,
    },
    "peers": {"source": "buffer"},
    # AdamW divides by the gradient's size: a rounding difference of a gradient of almost nothing
    # would become a whole step.
    "optimizer": {"learning_rate": 1e-4},
}


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
HERE = Path(__file__).parent


def launch(*arguments: object, cache: Path) -> subprocess.Popen[str]:
    environment = {
        "HSD_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CXX": "none",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(run: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def drawn(run: Path) -> list[tuple[Any, ...]]:
    records = read_json_lines(run / "rollouts.jsonl")
    return [(r["step"], r["question"], r["index"], r["token_ids"], r["peers"]) for r in records]


def column(run: Path, name: str) -> list[float]:
    return [r[name] for r in read_json_lines(run / "metrics.jsonl") if r["kind"] == "step"]


def assert_ends_at_once(how: str, run: Path, recipe: Path, cache: Path) -> str:
    """What two ranks of which one dies say of it, without torchrun's report."""
    job = launch(*TORCHRUN, HERE / "dying_rank.py", how, run, recipe, cache=cache)
    _, err = job.communicate(timeout=240)
    assert job.returncode != 0
    assert time.time() - float((run / "died").read_text()) < 20
    ours, _, report = err.partition("failed (exitcode")
    assert "Root Cause" in report
    assert "Connection closed by peer" not in err
    assert [step for step, _ in whole_checkpoints(run / "resume")] == [2]
    return ours


@pytest.mark.parametrize(("mode", "rank"), [("none", 0), ("full", 0), ("full", 2)])
def test_a_rank_that_fails_ends_the_job_with_one_traceback_and_three_ranks_go_on(
    mode: str,
    rank: int,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
) -> None:
    changes = {**CHANGES, "adapter": {"rank": rank}}
    if mode == "full":
        changes["warmup"] = {"steps": 0}
    run = tmp_path / "run"
    recipe = make_recipe(tmp_path / "recipe", {**changes, "sharding": {"mode": mode}})
    err = assert_ends_at_once("broken", run, recipe, tmp_path / "cache")
    assert err.count("Traceback (most recent call last)") == 1, err
    assert err.count("RuntimeError: rank 1 is broken") == 1, err
    more = launch(HERE / "forked.py", 3, "--resume", run, cache=tmp_path / "cache")
    _, err = more.communicate(timeout=240)
    assert more.returncode == 0, err
    whole = make_recipe(tmp_path / "recipe", changes)
    assert run_hsd("train", whole, "--run-dir", tmp_path / "whole") == 0
    assert drawn(run) == drawn(tmp_path / "whole")
    for name in ("kl", "ref_kl", "grad_norm"):
        assert column(run, name) == pytest.approx(column(tmp_path / "whole", name), rel=1e-3)
    found, expected = weights(run), weights(tmp_path / "whole")
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"sharding": {"mode": "full", "offload": "optimizer", "offload_reference": True}},
        {"sharding": {"mode": "full", "offload": "all"}, "adapter": {"rank": 2}},
    ],
    ids=["offloaded", "adapter"],
)
def test_two_ranks_that_were_killed_resume_bit_by_bit(
    changes: dict[str, Any], tmp_path: Path, make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {**CHANGES, **changes, "warmup": {"steps": 0}})
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert_ends_at_once("killed", run, recipe, tmp_path / "cache")
    for words in (["--resume", run], [recipe, "--run-dir", whole]):
        job = launch(HERE / "forked.py", 2, *words, cache=tmp_path / "cache")
        _, err = job.communicate(timeout=240)
        assert job.returncode == 0, err
    assert drawn(run) == drawn(whole)
    for name in ("loss", "kl", "ref_kl", "grad_norm"):
        assert column(run, name) == column(whole, name)
    assert torch.equal(weights(run), weights(whole))


@pytest.mark.skipif("HSD_KILLS" not in os.environ, reason="one of the longer ones: HSD_KILLS=20")
def test_a_rank_that_is_killed_ends_the_job_without_a_traceback(
    tmp_path: Path, make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe(tmp_path / "recipe", CHANGES)
    err = assert_ends_at_once("killed", tmp_path / "run", recipe, tmp_path / "cache")
    assert "Traceback" not in err, err


def test_a_signal_to_one_rank_saves_and_ends_all(
    tmp_path: Path, make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {**CHANGES, "steps": 400, "checkpoint_every": 0})
    run = tmp_path / "run"
    job = launch(*TORCHRUN, "-m", "hsd.train", recipe, "--run-dir", run, cache=tmp_path / "cache")
    metrics = run / "metrics.jsonl"
    while job.poll() is None and (not metrics.exists() or len(read_json_lines(metrics)) < 3):
        time.sleep(0.2)
    job.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = job.communicate(timeout=60)
    ((step, _),) = whole_checkpoints(run / "resume")
    assert step >= 2
    assert "hsd/" not in err, err  # no traceback of ours; torchrun has one of its own


def test_shards_of_two_ranks_become_shards_of_three(
    tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "saved").mkdir()
    job = launch(HERE / "resharding_rank.py", tmp_path, cache=tmp_path)
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    written, read = (load_file(tmp_path / f"{mode}.safetensors") for mode in ("write", "read"))
    before = model.state_dict()
    for name, value in written.items():
        change = (value - before[name]).norm()
        assert change > 0
        assert (read[name] - value).norm() <= 1e-4 * change
