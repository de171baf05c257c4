"""`hsd budget` as a command: what it shows, and what it says of wrong input."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from matplotlib.figure import Figure

from hsd.distributed.budget import command


def test_the_command(
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    recipe = make_recipe(
        tmp_path / "recipe", {"warmup": {"steps": 0}, "sharding": {"mode": "full"}}
    )
    figure = tmp_path / "budget.png"
    words = ["budget", recipe, "--response-tokens", 256, "--prompt-tokens", 32, "--figure", figure]
    assert run_hsd(*words, "--gpu-memory", "80GB") == 0
    shown, working = capsys.readouterr()
    assert working == "simulating a step: 256 response tokens on 8 GPUs\n"
    assert "fits, " in shown
    assert "not searched, the model lacks positions for more" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert run_hsd(*words, "--gpu-memory", "1GB", "--no-search") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "does not fit, 1." in shown
    assert "no engine fits beside the trainer" in shown
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-memory", "80"], "--gpu-memory: found '80', expected such as 80GB"),
        (["--gpu-memory", "80KB"], "--gpu-memory: found '80KB', expected such as 80GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory: found '0GB'"),
        (["--world-size", "0"], "--world-size: found 0, expected >= 1"),
        (["--world-size", "100000"], "--world-size: found 100000, expected at most 1024"),
        (
            ["--response-tokens", "300", "--prompt-tokens", "213"],
            "--response-tokens: found 300, expected at most 299, the positions of",
        ),
        (["--figure", "no/such/folder.png"], "--figure: found 'no/such/folder.png'"),
        (["--figure", "figure.txt"], "--figure: found 'figure.txt', expected a .png"),
    ],
)
def test_bad_arguments(
    words: list[str],
    said: str,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_hsd("budget", make_recipe(tmp_path), *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"adapter": {"rank": 2, "target_modules": ["none_such"]}},
            "adapter.target_modules: found ['none_such']",
        ),
        ({"objective": {"router_aux_coef": 0.1}}, "objective.router_aux_coef: found 0.1"),
    ],
)
def test_options_that_do_not_fit_the_model_are_one_line(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    figure = tmp_path / "budget.png"
    words = ["--response-tokens", 64, "--prompt-tokens", 32, "--figure", figure]
    assert run_hsd("budget", make_recipe(tmp_path, changes), *words) == 2
    assert f"hsd: error: {said}" in capsys.readouterr().err
    assert not dist.is_initialized()


def test_a_figure_that_cannot_be_written_whole_is_not_written(
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: Figure, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    recipe, figure = make_recipe(tmp_path / "recipe"), tmp_path / "budget.png"
    words = ["--response-tokens", 64, "--prompt-tokens", 32, "--figure", figure, "--no-search"]
    assert run_hsd("budget", recipe, *words) == 2
    err = capsys.readouterr().err
    assert f"--figure: {figure} could not be written (No space left on device)" in err
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("80GB", 80 * 10**9),
        ("80G", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("80Gi", 80 * 2**30),
        ("1.5gib", 3 * 2**29),
        ("81559MiB", 81559 * 2**20),
        ("0.08TB", 80 * 10**9),
    ],
)
def test_bytes(text: str, nbytes: int) -> None:
    assert command.parse_bytes(text) == nbytes
