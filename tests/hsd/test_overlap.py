from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hsd.cli import main
from hsd.data.questions import Question
from hsd.overlap import overlap

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def ask(*prompts: str) -> list[Question]:
    return [Question(id=str(n), prompt=prompt, answer="1") for n, prompt in enumerate(prompts)]


def shared(train: Sequence[str], measured: str) -> int:
    return len(overlap(ask(*train), ask(measured)).shared)


@pytest.mark.parametrize(
    ("train", "measured", "expected"),
    [
        (f"Before. {THIRTEEN} after", f"Other {THIRTEEN}!", 1),
        (THIRTEEN.upper(), THIRTEEN.replace(" ", ",\n  "), 1),
        (THIRTEEN.removesuffix("teen"), THIRTEEN, 0),  # twelve words in common
        (THIRTEEN.replace("seven", "7"), f"{THIRTEEN} fourteen", 0),
        (THIRTEEN.removesuffix(" thirteen"), THIRTEEN.removesuffix(" thirteen"), 0),  # too short
    ],
)
def test_thirteen_words_in_a_row(train: str, measured: str, expected: int) -> None:
    assert shared(["Nothing here.", train], measured) == expected


def test_what_is_reported() -> None:
    train = ask("Nothing.", f"x {THIRTEEN} y")
    measured = ask("Short.", f"y {THIRTEEN} x", "Quite another question " * 10)
    found = overlap(train, measured)
    assert (found.questions, found.short, found.instructions) == (3, 1, 0)
    assert found.shared == [(measured[1], train[1], THIRTEEN)]


@pytest.mark.parametrize(("copies", "expected"), [(10, (1, 0)), (11, (0, 1))])
def test_the_wording_of_an_instruction_is_no_overlap(
    copies: int, expected: tuple[int, int]
) -> None:
    train = ask(*(f"{n} {THIRTEEN}" for n in range(copies)))
    found = overlap(train, ask(f"new {THIRTEEN}"))
    assert (len(found.shared), found.instructions) == expected


def test_many_questions_take_seconds() -> None:
    draw = random.Random(0)
    words = [str(n) for n in range(5000)]
    prompts = [" ".join(draw.choices(words, k=60)) for _ in range(10_000)]
    copied = " ".join(prompts[7].split()[20:40])
    started = time.process_time()
    found = overlap(ask(*prompts), ask(*prompts[:0], copied, *reversed(prompts[9000:9500])))
    assert len(found.shared) == 501
    assert time.process_time() - started < 10  # 100,000 questions in ten times this


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, prompts in (
        ("train", ["a", f"x {THIRTEEN}"]),
        ("heldout", ["b", f"{THIRTEEN} z"]),
    ):
        text = "\n".join(json.dumps({"prompt": prompt, "answer": 1}) for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text(text)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[task]\nsource = "jsonl"\ntrain = "{tmp_path}/train.jsonl"\n'
        f'heldout = "{tmp_path}/heldout.jsonl"\n'
    )
    assert main(["overlap", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "1 (50.0%)" in out
    assert f"heldout:2 and train:2 of train: {THIRTEEN}" in out
    with pytest.raises(SystemExit):
        main(["overlap", str(recipe), "--task.train", str(tmp_path / "none.jsonl")])
    assert "none.jsonl: found no such file" in capsys.readouterr().err
