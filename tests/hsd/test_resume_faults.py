"""Checkpoints and replays that were damaged, or are of something else, end a run with one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hsd.distributed.checkpoint import whole_checkpoints
from hsd.run import loop

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]


@pytest.fixture(scope="module")
def stopped_run(
    tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe, run_hsd: RunHsd
) -> Path:
    """A run that a signal ended after its second step. Copy it."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = make_recipe(folder, {"warmup": {"steps": 0}, "adapter": {"rank": 2}})
    original = loop.train_step

    def stopping(trainer: Any, stream: Any, step: int, **options: Any) -> Any:
        result = original(trainer, stream, step, **options)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "train_step", stopping)
        assert run_hsd("train", recipe, "--run-dir", folder / "run") == 143
    return folder / "run"


def newest(run: Path) -> Path:
    return whole_checkpoints(run / "resume")[-1][1]


def weights(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def truncate_weights(run: Path) -> Path:
    file = weights(newest(run))
    os.truncate(file, file.stat().st_size // 2)
    return file


def empty_weights(run: Path) -> Path:
    os.truncate(weights(newest(run)), 0)
    return weights(newest(run))


def remove_weights(run: Path) -> Path:
    weights(newest(run)).unlink()
    return newest(run)


def truncate_still(run: Path) -> Path:
    file = weights(run / "resume" / "initial")
    os.truncate(file, file.stat().st_size - 100)
    return file


def remove_still(run: Path) -> Path:
    shutil.rmtree(run / "resume" / "initial")
    return run / "resume" / "initial"


def truncate_state(run: Path) -> Path:
    file = newest(run) / "state.json"
    os.truncate(file, 40)
    return file


def other_state(run: Path) -> Path:
    file = newest(run) / "state.json"
    file.write_text(json.dumps({"step": "two"}))
    return file


def truncate_generators(run: Path) -> Path:
    file = newest(run) / "rank-00000.json"
    os.truncate(file, 40)
    return file


def other_generators(run: Path) -> Path:
    file = newest(run) / "rank-00000.json"
    file.write_text(json.dumps({"torch": "AAAA"}))
    return file


def truncate_metrics(run: Path) -> Path:
    os.truncate(run / "metrics.jsonl", 10)
    return run / "metrics.jsonl"


def other_config(run: Path) -> Path:
    found = json.loads((run / "config.json").read_text())
    found["config"]["adapter"]["rank"] = 3
    (run / "config.json").write_text(json.dumps(found))
    return newest(run)


def unknown_option(run: Path) -> Path:
    found = json.loads((run / "config.json").read_text())
    found["config"]["nonsense"] = 1
    (run / "config.json").write_text(json.dumps(found))
    return run / "config.json"


def truncate_config(run: Path) -> Path:
    os.truncate(run / "config.json", 100)
    return run / "config.json"


@pytest.mark.parametrize(
    "damage",
    [
        truncate_weights,
        empty_weights,
        remove_weights,
        truncate_still,
        remove_still,
        truncate_state,
        other_state,
        truncate_generators,
        other_generators,
        truncate_metrics,
        other_config,
        unknown_option,
        truncate_config,
    ],
)
def test_a_damaged_run_is_not_resumed_and_the_file_is_named(
    damage: Callable[[Path], Path],
    stopped_run: Path,
    tmp_path: Path,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    named = damage(run)
    assert run_hsd("train", "--resume", run) == 2
    err = capsys.readouterr().err
    assert err.startswith("hsd: error: ") and err.count("\n") == 1, err
    assert str(named) in err


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Writing more ends as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("nbytes", "every"),
    [(8_000, 0), (50_000, 1), (50_000, 0), (150_000, 1)],
    ids=["rollouts", "what never changes", "export", "optimiser"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(
    nbytes: int,
    every: int,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {"warmup": {"steps": 0}, "checkpoint_every": every})
    run = tmp_path / "run"
    with files_of_at_most(nbytes):
        assert run_hsd("train", recipe, "--run-dir", run) == 1
    err = capsys.readouterr().err
    assert err.startswith("hsd: error: File too large; ") and err.count("\n") == 1, err
    assert not [path for path in run.rglob(".*")]
    assert run_hsd("train", "--resume", run) == 0
    assert (run / "checkpoint" / "model.safetensors").exists()


def test_a_disk_that_is_full_at_the_start_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {"warmup": {"steps": 0}})
    run = tmp_path / "run"
    with files_of_at_most(1000):
        assert run_hsd("train", recipe, "--run-dir", run) == 2
    err = capsys.readouterr().err
    found = f"hsd: error: found a full disk (File too large), expected room in {run} and "
    assert err.startswith(found) and err.count("\n") == 1, err
    assert not run.exists()


REPLAYS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "no JSON": b"not json\n",
    "no object": b"[1, 2]\n",
    "another record": b'{"kind": "step", "step": 1}\n',
    "cut": b'{"step": 1, "question": "q", "index": 0, "token_ids": [1, 2',
}


@pytest.mark.parametrize("content", REPLAYS.values(), ids=REPLAYS)
def test_a_replay_of_no_rollouts_is_one_line(
    content: bytes,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_bytes(content)
    recipe = make_recipe(tmp_path / "recipe", {"warmup": {"steps": 0}})
    run = tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run, "--replay", file) == 2
    err = capsys.readouterr().err
    assert err.startswith("hsd: error: ") and err.count("\n") == 1, err
    assert str(file) in err
    assert not run.exists()
