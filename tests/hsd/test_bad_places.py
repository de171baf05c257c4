"""Folders, programs and addresses that cannot be used: one line each, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hsd.checks import require_folder
from hsd.rollout.config import EngineConfig


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("hsd: error: ") and error.count("\n") == 1
    return error


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file, below which there is no folder."""
    path = tmp_path / "places" / "file"
    path.parent.mkdir()
    path.write_text("kept", encoding="utf-8")
    return path


def test_a_run_folder_below_a_file(
    file: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(tmp_path / "recipe")
    assert run_hsd("train", recipe, "--run-dir", file / "run") == 2
    assert f"run_dir: found '{file / 'run'}', expected a folder that can be" in one_line(capsys)
    assert listing(file.parent) == [file]


@pytest.mark.parametrize(
    ("command", "option"), [("report", "--out"), ("credit", "--out"), ("eval", "--output")]
)
def test_results_below_a_file(
    command: str,
    option: str,
    file: Path,
    trained_run: Path,
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for out in (file / "out", file / "more" / "out"):
        assert run_hsd(command, trained_run, option, out) == 2
        assert f"{option}: found '{out}', expected a folder that can be written" in one_line(capsys)
    assert listing(file.parent) == [file] and file.read_text(encoding="utf-8") == "kept"


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_folder("--out", tmp_path / "new" / "folder")
    # The tests may run as a user who may do everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ValueError, match=r"--out: found '.*folder', expected a folder"):
        require_folder("--out", tmp_path / "new" / "folder")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--out: found"):
        require_folder("--out", tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:-1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:",
        "http://[::1:8000",
        "http://127.0.0.1:8000?model=a",
        "http://user@127.0.0.1:8000",
    ],
)
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.urls: found 'http.*, expected http://HOST:PORT"):
        EngineConfig(kind="vllm", urls=(url,))


def test_addresses_that_are_some() -> None:
    urls = ("http://127.0.0.1:8000", "http://localhost:8000/", "http://[::1]:8000")
    assert EngineConfig(kind="vllm", urls=urls).urls == urls


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "(No such file or directory), expected the Python of an environment with vLLM"),
        ("#!/bin/sh\nexit 1\n", "without vLLM, expected the Python of an environment with vLLM"),
    ],
)
def test_a_python_without_vllm(
    script: str | None,
    said: str,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    python, run = tmp_path / "bin" / "python", tmp_path / "run"
    if script is not None:
        python.parent.mkdir()
        python.write_text(script, encoding="utf-8")
        python.chmod(0o755)
    recipe = make_recipe(tmp_path / "recipe", {"warmup": {"steps": 0}})
    words = ["--run-dir", run, "--engine.kind", "vllm", "--engine.python", python]
    assert run_hsd("train", recipe, *words) == 2
    error = one_line(capsys)
    assert "engine.python: found '" in error and said in error
    assert not run.exists()


@pytest.mark.parametrize("size", ["2", "two"])
def test_a_world_that_nobody_started(
    size: str,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert run_hsd("train", make_recipe(tmp_path / "recipe"), "--run-dir", tmp_path / "run") == 2
    assert f"WORLD_SIZE: found '{size}', expected none, or torchrun's" in one_line(capsys)
    assert not (tmp_path / "run").exists()
