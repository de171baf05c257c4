"""The engine with vLLM in this process, and vLLM's own weight transfer, against stand-ins."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from fake_vllm import STOP, Server, fingerprint
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vllm_cases import SAMPLING, Start, sample

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Sampling
from hsd.rollout.vllm_colocated import VllmColocatedEngine

MakeModel = Callable[..., PreTrainedModel]


class FakeLLM:
    """vllm.LLM as its documentation has it; it cannot sample before weights and cache are there."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.weights = fingerprint(Path(options["model"]))
        self.awake = {"weights", "kv_cache"}
        self.cached = False
        self.finish = "stop"
        FakeLLM.made.append(self)

    def sleep(self, level: int) -> None:
        assert level == 2 and self.options["enable_sleep_mode"]
        self.awake, self.weights = set(), math.nan

    def wake_up(self, tags: list[str]) -> None:
        assert not self.awake & set(tags)
        # The cache beside old and new weights would not fit.
        assert tags != ["kv_cache"] or not math.isnan(self.weights)
        self.awake |= set(tags)

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> None:
        assert method == "reload_weights" and "weights" in self.awake
        self.weights = fingerprint(Path(kwargs["weights_path"]))

    def reset_prefix_cache(self) -> bool:
        self.cached = False
        return True

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert self.awake == {"weights", "kv_cache"} and not self.cached
        self.cached = True
        return [
            SimpleNamespace(outputs=[self.output(prompt, one, index) for index in range(one.n)])
            for prompt, one in zip(prompts, params, strict=True)
        ]

    def output(self, prompt: Any, params: Any, index: int) -> Any:
        tokens = [prompt["prompt_token_ids"][0], (params.seed + index) % 200, STOP]
        entry = SimpleNamespace(logprob=-1 - self.weights)
        return SimpleNamespace(
            token_ids=tokens,
            logprobs=[{token: entry} for token in tokens],
            finish_reason=self.finish,
        )


@pytest.fixture
def make_engine(
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., VllmColocatedEngine]:
    module = ModuleType("vllm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    FakeLLM.made.clear()

    def make(*, temperature: float = 1.0, **options: Any) -> VllmColocatedEngine:
        return VllmColocatedEngine(
            EngineConfig(kind="vllm_colocated", sync_directory=tmp_path / "sync", **options),
            make_model(),
            tokenizer,
            compute_dtype=torch.bfloat16,
            sampling=Sampling(max_new_tokens=6, temperature=temperature),
            seed=3,
            world=World(rank=0, size=1),
        )

    return make


def generate(engine: VllmColocatedEngine) -> Any:
    prompts: list[list[int]] = [[5, 6], [7]]
    return engine.generate(prompts, seeds=[10, 20], group_size=2, sampling=SAMPLING)


def test_rollouts_of_the_first_and_of_later_weights(
    make_engine: Callable[..., VllmColocatedEngine], make_model: MakeModel, tmp_path: Path
) -> None:
    engine = make_engine()
    for version in range(3):
        if version:
            engine.sleep()
            engine.update_weights(make_model(seed=version), version=version)
        groups = generate(engine)
        assert [[one.token_ids for one in group] for group in groups] == [
            [(5, 10, STOP), (5, 11, STOP)],
            [(7, 20, STOP), (7, 21, STOP)],
        ]
        (newest,) = (tmp_path / "sync").glob("*/version-*")
        for one in (one for group in groups for one in group):
            assert one.policy_version == version
            assert one.logprobs == (-1 - fingerprint(newest),) * 3
    engine.close()
    assert not list((tmp_path / "sync").iterdir())


def test_it_does_not_sample_without_weights(
    make_engine: Callable[..., VllmColocatedEngine],
) -> None:
    engine = make_engine()
    engine.sleep()
    with pytest.raises(EngineError, match="without weights since it went to sleep"):
        generate(engine)


def test_a_rollout_that_did_not_end_is_no_sample(
    make_engine: Callable[..., VllmColocatedEngine],
) -> None:
    engine = make_engine()
    FakeLLM.made[0].finish = "abort"
    with pytest.raises(EngineError, match="ended by 'abort'"):
        generate(engine)


@pytest.mark.parametrize(
    ("temperature", "mode"), [(1.0, "raw_logprobs"), (0.7, "processed_logprobs")]
)
def test_vllm_is_told_dtype_log_probs_and_what_the_recipe_adds(
    temperature: float, mode: str, make_engine: Callable[..., VllmColocatedEngine]
) -> None:
    make_engine(temperature=temperature, arguments=("gpu_memory_utilization=0.4",))
    options = FakeLLM.made[0].options
    assert (options["dtype"], options["logprobs_mode"]) == ("bfloat16", mode)
    assert (options["gpu_memory_utilization"], options["seed"]) == (0.4, 3)
    with pytest.raises(EngineError, match=r"engine\.arguments: found 'a=b', expected key=JSON"):
        make_engine(arguments=("a=b",))


@dataclass
class FakeTransfer:
    """What a trainer's side of vLLM's weight transfer is made of, and what it has sent."""

    init: Any
    url: str
    source: Any
    sent: int = 0
    shut: bool = False

    def send_weights(self) -> None:
        declared = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
        assert declared == [(n, v.dtype, tuple(v.shape)) for n, v in self.source]
        self.sent += 1

    def shutdown(self) -> None:
        self.shut = True


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTransfer]:
    made: list[FakeTransfer] = []

    def trainer_init(init: Any, *, client: str, source: Any) -> FakeTransfer:
        made.append(FakeTransfer(init, client, source))
        return made[-1]

    package = ModuleType("vllm.distributed.weight_transfer")
    engine = ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    names = {
        "HTTPVLLMWeightSyncClient": lambda url: url,
        "WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init),
        "ParamMeta": lambda name, dtype, shape: SimpleNamespace(
            name=name, dtype=dtype, shape=shape
        ),
    }
    for name, value in names.items():
        setattr(package, name, value)
    engine.NCCLTrainerInitInfo = SimpleNamespace  # type: ignore[attr-defined]
    for module in (ModuleType("vllm"), ModuleType("vllm.distributed"), package, engine):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_vllm_s_weight_transfer_takes_the_place_of_the_files(
    server: Server, start: Start, make_model: MakeModel, transfers: list[FakeTransfer]
) -> None:
    engine = start(urls=(server.url,), weight_sync="nccl")
    (transfer,) = transfers
    assert (transfer.url, transfer.init.world_size, transfer.init.rank) == (server.url, 2, 0)
    engine.update_weights(make_model(), version=1)
    assert (len(transfers), transfer.sent) == (1, 2)
    assert "collective_rpc" not in server.called
    server.weights = 0.0
    assert {one.policy_version for group in sample(engine) for one in group} == {1}
    engine.close()
    assert transfer.shut
