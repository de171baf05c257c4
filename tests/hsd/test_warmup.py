"""Supervised warm-up: it teaches, its result is cached, and the cache knows what it depends on."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from hsd import warmup
from hsd.config import Config
from hsd.data.questions import Question
from hsd.policy.head import output_head
from hsd.policy.load import load_policy
from hsd.recipe import config_from_dict
from hsd.warmup import warm_up

QUESTIONS = tuple(
    Question(id=str(n), prompt=f"Say {n}.", answer=str(n), solution=f"{n}.") for n in range(6)
)


@pytest.fixture
def configure(model_directory: Path) -> Callable[..., Config]:
    def make(**tables: object) -> Config:
        values: dict[str, object] = {
            "model": {"name": str(model_directory)},
            "warmup": {"steps": 8, "batch_size": 4, "learning_rate": 1e-2},
        }
        for name, value in tables.items():
            own = values.get(name, {})
            values[name] = {**own, **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
        return config_from_dict(values, source="test")

    return make


def warmed(
    config: Config, questions: tuple[Question, ...] = QUESTIONS
) -> tuple[PreTrainedModel, str]:
    """The model, and what the console said."""
    model, tokenizer = load_policy(config.model.name)
    said = io.StringIO()
    warm_up(
        config,
        model,
        tokenizer,
        output_head(model),
        questions,
        compute_dtype=torch.float32,
        console=Console(file=said, width=120),
    )
    return model, said.getvalue()


def losses(said: str) -> list[float]:
    return [float(value) for value in re.findall(r"step \d+: loss ([\d.]+)", said)]


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_the_loss_falls(configure: Callable[..., Config]) -> None:
    found = losses(warmed(configure(warmup={"steps": 24}))[1])
    assert len(found) == 24
    assert found[-1] < 0.5 * found[0]


def test_steps_are_counted_from_one(configure: Callable[..., Config]) -> None:
    _, said = warmed(configure())
    assert re.findall(r"step (\d+):", said) == [str(n) for n in range(1, 9)]


def test_a_second_call_takes_the_weights_of_the_first(
    configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = warmed(configure())
    monkeypatch.setattr(warmup, "_supervised_loss", lambda *_: pytest.fail("it trains again"))
    again, said = warmed(configure())
    assert "cached" in said
    assert equal(first, again)


def test_training_again_gives_the_same_weights(
    configure: Callable[..., Config], tmp_path: Path
) -> None:
    first, _ = warmed(configure())
    shutil.rmtree(tmp_path / "cache")
    assert equal(first, warmed(configure())[0])


def test_an_interrupted_warm_up_leaves_no_cache(
    configure: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "_supervised_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warmed(configure())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"warmup": {"steps": 9}},
        {"warmup": {"batch_size": 5}},
        {"warmup": {"learning_rate": 2e-2}},
        {"warmup": {"hint_share": 0.25}},
        {"context": {"system": "Be brief."}},
        {"optimizer": {"max_grad_norm": 0.5}},
    ],
    ids=json.dumps,
)
def test_what_the_weights_depend_on_is_in_the_key(
    change: dict[str, object], configure: Callable[..., Config]
) -> None:
    keys = [warmup._key(c, QUESTIONS, torch.float32) for c in (configure(), configure(**change))]
    assert keys[0] != keys[1]


def test_questions_and_compute_dtype_are_in_the_key(configure: Callable[..., Config]) -> None:
    config = configure()
    keys = {
        warmup._key(config, QUESTIONS, torch.float32),
        warmup._key(config, QUESTIONS[:-1], torch.float32),
        warmup._key(config, QUESTIONS[::-1], torch.float32),
        warmup._key(config, QUESTIONS, torch.bfloat16),
    }
    assert len(keys) == 4


def test_the_files_of_the_model_are_in_the_key(
    configure: Callable[..., Config], model_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_directory, tmp_path / "model")
    config = configure(model={"name": str(model)})
    before = warmup._key(config, QUESTIONS, torch.float32)
    assert warmup._key(config, QUESTIONS, torch.float32) == before
    shutil.copy(model / "config.json", model / "config.json.new")
    (model / "config.json.new").replace(model / "config.json")
    assert warmup._key(config, QUESTIONS, torch.float32) != before


@pytest.mark.parametrize(
    "change",
    [
        {"objective": {"divergence": "reverse_kl", "window": 3, "teacher": "initial"}},
        {"context": {"show_peer": False, "show_answer": False}},
        {"context": {"show_demonstration": True, "fallback": "skip"}, "peers": {"count": 2}},
        {"optimizer": {"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 2}},
        {"rollout": {"group_size": 3, "temperature": 0.5}},
        {"steps": 99},
        {"run_dir": "elsewhere"},
    ],
    ids=json.dumps,
)
def test_runs_that_differ_after_the_warm_up_share_it(
    change: dict[str, object], configure: Callable[..., Config]
) -> None:
    keys = [warmup._key(c, QUESTIONS, torch.float32) for c in (configure(), configure(**change))]
    assert keys[0] == keys[1]


def test_a_question_without_a_solution_is_refused(configure: Callable[..., Config]) -> None:
    questions = (*QUESTIONS, Question(id="bare", prompt="Say 9.", answer="9"))
    with pytest.raises(ValueError, match=r"warmup\.steps: question 'bare' has no solution"):
        warmed(configure(), questions)


@pytest.mark.parametrize(("share", "hinted"), [(0.0, 0), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_the_share_of_prompts_with_a_hint(
    share: float,
    hinted: int,
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[str] = []
    original = warmup.response_hidden
    _, tokenizer = load_policy(configure().model.name)

    def recorded(model: PreTrainedModel, given: list[list[int]], *args: object, **kw: object):  # type: ignore[no-untyped-def]
        prompts.extend(str(tokenizer.decode(prompt)) for prompt in given)
        return original(model, given, *args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(warmup, "response_hidden", recorded)
    warmed(configure(warmup={"steps": 1, "hint_share": share}))
    answers = [prompt for prompt in prompts if "Correct final answer" in prompt]
    peers = [prompt for prompt in prompts if "successful solution" in prompt]
    assert len(prompts) == 4
    assert (len(answers), len(peers)) == (hinted, hinted // 2)
