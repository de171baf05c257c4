"""A run of each recipe on a tiny model, and the models beside the policy."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsd import train
from hsd.config import Config
from hsd.metrics import read_json_lines
from hsd.policy.teachers import make_policy
from hsd.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
METHODS = sorted(  # quickstart and the large models have tests of their own
    {p.stem for p in RECIPES.glob("*.toml")}
    - {p.stem for pattern in ("quick*", "qwen3*") for p in RECIPES.glob(pattern)}
)
WITHOUT_TEACHER = {"grpo", "dr_grpo", "gspo", "dapo"}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_three_steps(
    name: str,
    tmp_path: Path,
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
) -> None:
    objective = {"overlong_tokens": 2} if name == "dapo" else {}
    optimizer = {"updates_per_step": 2} if name in ("gspo", "dapo") else {}
    recipe = make_recipe(
        tmp_path / "recipe",
        {"base": str(RECIPES / f"{name}.toml"), "objective": objective, "optimizer": optimizer},
    )
    run = tmp_path / "run"
    assert run_hsd("train", recipe, "--run-dir", run) == 0
    records = [r for r in read_json_lines(run / "metrics.jsonl") if r["kind"] == "step"]
    assert len(records) == 3
    assert all(value is not None for record in records for value in record.values())
    assert any(record["grad_norm"] > 0 for record in records)
    assert ("kl" in records[0]) == (name not in WITHOUT_TEACHER)
    assert records[-1]["ref_kl"] > 0


def test_the_trainer_names_no_recipe() -> None:
    tasks = {"human_eval", "math_style", "own_data"}
    names = {path.stem for path in RECIPES.glob("*.toml")} - tasks - {"hsd"}
    package = Path(train.__file__).parent
    files = [package / name for name in ("train.py", "trainer.py", "warmup.py", "evaluate.py")]
    files += [package / "objective" / "step.py", *(package / "run").glob("*.py")]
    for file in files:
        assert not set(re.findall(r"\w+", file.read_text().lower())) & names, file
    # The parts may say in a comment which method a formula is of, and nowhere else.
    parts = [f for name in ("objective", "policy", "rollout") for f in package.glob(f"{name}/*.py")]
    for file in (*files, *parts):
        tree = ast.parse(file.read_text())
        comments = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in comments:
                assert node.value not in names | {"hsd"}, (file, node.lineno)


def test_an_average_starts_at_the_policy_and_follows_it(make_model: Callable[..., Any]) -> None:
    config = load_recipe(RECIPES / "sdpo.toml")
    model = make_model()
    policy = make_policy(model, config.objective, compute_dtype=torch.float32)
    assert policy.teacher is not None
    before = [p.clone() for p in policy.teacher.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    train.after_update(policy, config.objective, updates=1)
    for old, now, initial in zip(
        before, policy.teacher.parameters(), policy.initial.parameters(), strict=True
    ):
        assert torch.allclose(now, old + 0.05, atol=1e-5)
        assert torch.equal(initial, old)


def test_a_refresh_moves_the_reference_and_not_the_initial_teacher(
    make_model: Callable[..., Any],
) -> None:
    objective = replace(
        Config().objective, teacher="initial", ref_refresh_every=2, ref_refresh_decay=0.75
    )
    model = make_model()
    policy = make_policy(model, objective, compute_dtype=torch.float32)
    assert policy.teacher is not None
    start = next(model.parameters()).clone()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    for updates, moved in ((1, 0.0), (2, 0.25), (3, 0.25)):
        train.after_update(policy, objective, updates=updates)
        now = next(policy.initial.parameters())
        assert torch.allclose(now, start + moved, atol=1e-5)
    assert torch.equal(next(policy.teacher.parameters()), start)
