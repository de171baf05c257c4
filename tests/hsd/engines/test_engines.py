"""Which engine a run gets, and the check that it samples from the trainer's policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hsd.config import Config, RolloutConfig
from hsd.distributed.process import World
from hsd.objective.config import ObjectiveConfig
from hsd.policy.teachers import make_policy
from hsd.rollout.config import EngineConfig
from hsd.rollout.engines import check_engine, make_engine
from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import EngineError, Rollout, Sampling

MakeModel = Callable[..., PreTrainedModel]

SAMPLING = Sampling(max_new_tokens=8, temperature=0.6)
PROMPT = [5, 6, 7]


def check(engine: HfEngine, model: PreTrainedModel, **changes: Any) -> float:
    policy = make_policy(model, ObjectiveConfig(), compute_dtype=torch.float32)
    options: dict[str, Any] = {"sampling": SAMPLING, "tolerance": 1e-3, **changes}
    return check_engine(engine, policy, PROMPT, **options)


def make_hf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> HfEngine:
    return HfEngine(model, tokenizer, compute_dtype=torch.float32, batch_rows=64)


@pytest.mark.parametrize(
    "kind", ["llama-tied", "gemma2-softcap", "cohere-scale", "granite-scale", "phi-bias"]
)
def test_an_engine_with_the_policy_s_weights_passes(
    kind: str, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(kind)
    assert check(make_hf(model, tokenizer), model) < 1e-4


def test_an_engine_with_other_weights_is_refused(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(EngineError, match=r"nats from the trainer's .* engine\.tolerance, 0\.001"):
        check(make_hf(make_model(seed=1), tokenizer), make_model())


@pytest.mark.parametrize("wrong", [{"temperature": 1.0}, {"shift": torch.nan}])
def test_an_engine_with_log_probs_of_another_temperature_or_none_is_refused(
    wrong: dict[str, float],
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = HfEngine.generate

    def changed(self: HfEngine, *prompts: Any, sampling: Sampling, **options: Any) -> Any:
        sampling = replace(sampling, temperature=wrong.get("temperature", sampling.temperature))
        groups = generate(self, *prompts, sampling=sampling, **options)
        shift = wrong.get("shift", 0.0)
        return [[shifted(rollout, shift) for rollout in group] for group in groups]

    def shifted(rollout: Rollout, shift: float) -> Rollout:
        return replace(rollout, logprobs=tuple(value + shift for value in rollout.logprobs))

    monkeypatch.setattr(HfEngine, "generate", changed)
    model = make_model()
    with pytest.raises(EngineError, match="expected at most"):
        check(make_hf(model, tokenizer), model)


def test_the_default_engine_is_transformers(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make_engine(
        Config(), make_model(), tokenizer, sampling=SAMPLING, world=World(rank=0, size=1)
    )
    assert isinstance(engine, HfEngine)


def test_vllm_in_this_process_needs_vllm_here(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    config = Config(engine=EngineConfig(kind="vllm_colocated"))
    with pytest.raises(EngineError, match=r"engine\.kind: 'vllm_colocated' needs vLLM here"):
        make_engine(config, make_model(), tokenizer, sampling=SAMPLING, world=World(rank=0, size=1))


def test_vllm_cannot_report_log_probs_between_temperature_and_top_p() -> None:
    rollout = RolloutConfig(temperature=0.7, top_p=0.9)
    Config(rollout=rollout)
    with pytest.raises(ValueError, match=r"rollout\.top_p: found 0\.9, expected 1 beside"):
        Config(rollout=rollout, engine=EngineConfig(kind="vllm"))


def test_a_run_whose_engine_is_wrong_does_not_start(
    make_recipe: Callable[..., Path], run_hsd: Callable[..., int], tmp_path: Path, capsys: Any
) -> None:
    recipe = make_recipe(tmp_path, {"engine": {"tolerance": 1e-12}})
    assert run_hsd("train", recipe, "--run-dir", tmp_path / "run") == 2
    assert "engine.tolerance, 1e-12" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_whose_engine_is_lost_ends_with_one_line_and_its_checkpoint(
    make_recipe: Callable[..., Path],
    run_hsd: Callable[..., int],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(self: HfEngine) -> None:
        raise EngineError("engine: gone")

    closed = []
    monkeypatch.setattr(HfEngine, "sleep", lose)
    monkeypatch.setattr(HfEngine, "close", lambda self: closed.append(self))
    run = tmp_path / "run"
    assert run_hsd("train", make_recipe(tmp_path), "--run-dir", run) == 1
    assert "stopped: engine: gone" in capsys.readouterr().out
    assert (run / "checkpoint" / "config.json").exists() and len(closed) == 1
    assert [json.loads(line)["kind"] for line in (run / "metrics.jsonl").open()][-1] != "step"
