"""`hsd eval` and `hsd credit` sample with the engine of the recipe, or of their flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import Server

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]


@pytest.fixture
def options(server: Server, tmp_path: Path) -> dict[str, Any]:
    return {"kind": "vllm", "urls": [server.url], "sync_directory": str(tmp_path / "sync")}


def flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in options.items()
        for word in (
            f"--engine.{name.replace('_', '-')}",
            *(value if isinstance(value, list) else [value]),
        )
    ]


@pytest.mark.parametrize("by", ["recipe", "flags"])
def test_eval_samples_with_a_server(
    by: str,
    options: dict[str, Any],
    server: Server,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {"engine": options} if by == "recipe" else {})
    words = flags(options) if by == "flags" else []
    out = tmp_path / "out"
    assert run_hsd("eval", recipe, "--samples", 3, "--greedy", "--output", out, *words) == 0
    asked = [body["sampling_params"] for body in server.requests]
    assert sorted((each["temperature"], each["n"]) for each in asked) == [
        *[(0.0, 1)] * 4,
        *[(1.0, 3)] * 4,
    ]
    assert "collective_rpc" in server.called  # the model that is evaluated was loaded
    kept = [
        json.loads(line) for file in out.glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert len([each for each in kept if "completions" in each or "samples" in each]) >= 8
    assert not list((tmp_path / "sync").iterdir())


def test_credit_samples_with_a_server(
    options: dict[str, Any],
    server: Server,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
) -> None:
    recipe = make_recipe(tmp_path / "recipe", {"engine": options})
    assert run_hsd("credit", recipe, "--groups", 2, "--out", tmp_path / "out") == 0
    assert [body["sampling_params"]["n"] for body in server.requests] == [4, 4]
    lines = (tmp_path / "out" / "credit.jsonl").read_text().splitlines()
    assert lines
    assert not list((tmp_path / "sync").iterdir())


def test_credit_of_recorded_rollouts_has_no_engine(
    options: dict[str, Any], tmp_path: Path, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "rollouts.jsonl"
    recorded.touch()
    assert run_hsd("credit", recorded, *flags(options)) == 2
    assert "--engine.kind: found beside recorded rollouts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine.kind", "gpt"], "engine.kind"),
        (["--engine.urls", "http://127.0.0.1:1"], "engine.urls"),
        (["--engine.nothing", "1"], "engine.nothing"),
    ],
)
def test_wrong_engine_flags_are_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_hsd("eval", make_recipe(tmp_path / "recipe"), *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsd: error: ") and said in error and error.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(
    tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--engine.kind", "vllm", "--engine.urls", "http://127.0.0.1:9"]
    recipe = make_recipe(tmp_path / "recipe")
    out = ["--output", tmp_path / "out"]
    assert run_hsd("eval", recipe, *out, *words, "--engine.start-timeout", "0.5") == 2
    assert "127.0.0.1:9 does not answer after 0.5 s" in capsys.readouterr().err
