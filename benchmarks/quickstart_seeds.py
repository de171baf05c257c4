"""Runs recipes over seeds and prints the table of what HSD changed.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2

A run that is complete in its folder is not run again: the command resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hsd.metrics import read_json_lines
from hsd.scores import half_width

RECIPES = ("quickstart", "quickstart_published", "quickstart_control")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="names in recipes/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        for seed in arguments.seeds:
            folder = arguments.runs / f"{recipe}-{seed}"
            if not _complete(folder):
                command = [sys.executable, "-m", "hsd", "train", f"recipes/{recipe}.toml"]
                subprocess.run(
                    [*command, "--seed", str(seed), "--run-dir", str(folder)], check=True
                )
            rows.append(_row(recipe, seed, folder))
    print(table(rows))


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [record for record in read_json_lines(path) if record["kind"] == kind]


def _complete(folder: Path) -> bool:
    config = folder / "config.json"
    if not config.is_file():
        return False
    steps = json.loads(config.read_text(encoding="utf-8"))["config"]["steps"]
    evaluations = _records(folder, "evaluation")
    return bool(evaluations) and evaluations[-1]["step"] == steps


def _row(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """What a run's files say: accuracy before, at its best and after, and the paired change."""
    evaluations, steps = _records(folder, "evaluation"), _records(folder, "step")
    before, after = evaluations[0], evaluations[-1]
    rates = [
        torch.tensor(each["correct_per_question"]).double() / each["samples"]
        for each in (before, after)
    ]
    difference = rates[1] - rates[0]
    return {
        "recipe": recipe,
        "seed": seed,
        "samples": before["samples"],
        "before": before["avg"],
        "middle": [each["avg"] for each in evaluations[1:-1]],
        "after": after["avg"],
        "change": float(difference.mean()),
        "interval": half_width(difference),
        "pass_before": before["pass"],
        "pass_after": after["pass"],
        "ref_kl": steps[-1]["ref_kl"] if steps else math.nan,
        "minutes": sum(each["rollout_seconds"] + each["update_seconds"] for each in steps) / 60,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    k = rows[0]["samples"]
    lines = [
        f"| recipe | seed | avg@{k} before | on the way | after | change (95 % interval) "
        f"| pass@{k} before | after | KL to start | HSD steps, min |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        middle = ", ".join(f"{value:.3f}" for value in row["middle"]) or "-"
        lines.append(
            f"| {row['recipe']} | {row['seed']} | {row['before']:.3f} | {middle} "
            f"| {row['after']:.3f} | {row['change']:+.3f} ± {row['interval']:.3f} "
            f"| {row['pass_before']:.3f} | {row['pass_after']:.3f} | {row['ref_kl']:.3f} "
            f"| {row['minutes']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
