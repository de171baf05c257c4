"""The three commands of README.md and docs/own-data.md, as they stand there, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hsd.data.task_configs import JsonlTask
from hsd.metrics import read_json_lines
from hsd.recipe import load_recipe, parse_arguments

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "2", "--rollout.max-new-tokens", "4", "--evaluation.samples", "1"]

RunHsd = Callable[..., int]


def commands(page: str) -> list[list[str]]:
    """The block of a page that starts with `hsd overlap`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"^```(?:sh)?\n(hsd overlap.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_directory: Path) -> Path:
    """A folder with what the page speaks of: recipes, questions.jsonl and a model."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "model").symlink_to(model_directory)
    lines = [json.dumps({"prompt": f"What is {n} + 1?", "answer": n + 1}) for n in range(30)]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/own-data.md"])
def test_three_commands_from_a_file_of_questions_to_a_measured_checkpoint(
    page: str, checkout: Path, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    overlap, train, evaluate = commands(page)
    assert [command[:2] for command in (overlap, train, evaluate)] == [
        ["hsd", "overlap"],
        ["hsd", "train"],
        ["hsd", "eval"],
    ]
    assert run_hsd(*overlap[1:]) == 0
    assert "3 questions of questions.jsonl held out, 27 left" in capsys.readouterr().out
    # Smaller, and otherwise as it is written.
    assert run_hsd(*train[1:], *SMALL) == 0
    assert "3 questions of questions.jsonl held out" in capsys.readouterr().out
    run = checkout / evaluate[2]
    kinds = [record["kind"] for record in read_json_lines(run / "metrics.jsonl")]
    assert kinds == ["evaluation", "step", "step", "evaluation"]
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    assert run_hsd(*evaluate[1:]) == 0
    (completions,) = (run / "evaluations").glob("heldout-*.jsonl")
    settings, *questions = read_json_lines(completions)
    assert settings["settings"]["samples"] == 8
    trained = {record["prompt"] for record in read_json_lines(run / "rollouts.jsonl")}
    measured = {record["prompt"] for record in questions}
    assert len(measured) == 3 and not measured & trained


def test_a_method_on_another_base(checkout: Path) -> None:
    words = ["recipes/grpo.toml", "--base", "recipes/own_data.toml", "--task.train", "x.jsonl"]
    config = parse_arguments(words, prog="hsd train")
    own = load_recipe(Path("recipes/own_data.toml"))
    grpo = load_recipe(Path("recipes/grpo.toml"))
    assert config.objective == grpo.objective
    assert config.task == JsonlTask(train=Path("x.jsonl"))
    assert (config.rollout, config.warmup, config.context, config.optimizer) == (
        own.rollout,
        own.warmup,
        own.context,
        own.optimizer,
    )
    assert config.run_dir == Path("runs/grpo-own_data-seed0")
    again = parse_arguments([words[0], "--base=recipes/own_data.toml"], prog="hsd train")
    assert again.rollout == own.rollout


def test_the_default_method_is_hsd_as_published(checkout: Path) -> None:
    own = load_recipe(Path("recipes/own_data.toml"))
    assert own.objective == load_recipe(Path("recipes/hsd.toml")).objective


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/grpo.toml", "--base"], "--base: found nothing behind it"),
        (["recipes/grpo.toml", "--base", "no.toml"], "no.toml: no such recipe"),
        (["recipes/grpo.toml", "--task.source", "jsonl"], "expected a base with such a task"),
    ],
)
def test_a_wrong_base_is_one_line(
    checkout: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words, prog="hsd train")
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_recipe_is_evaluated_on_any_model(checkout: Path, run_hsd: RunHsd) -> None:
    recipe = checkout / "quick.toml"
    recipe.write_text(
        'base = "recipes/math_style.toml"\n[rollout]\nmax_new_tokens = 2\n', encoding="utf-8"
    )
    arguments = ("quick.toml", "--model", "path/to/model", "--samples", 1, "--limit", 5)
    assert run_hsd("eval", *arguments) == 0
    (path,) = (checkout / "evaluations" / "quick").glob("heldout-*.jsonl")
    assert len(read_json_lines(path)) == 1 + 5
