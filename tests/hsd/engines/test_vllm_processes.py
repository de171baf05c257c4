"""Servers that the engine starts: lost, brought back, and gone when they should be."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from vllm_cases import SAMPLING, Start, behave, require_current, sample

from hsd.distributed.process import World
from hsd.rollout.config import EngineConfig
from hsd.rollout.protocol import EngineError, Sampling
from hsd.rollout.server_launch import server_command, server_environment, server_places
from hsd.rollout.server_process import ServerProcess

MakeModel = Callable[..., Any]


@pytest.mark.parametrize(
    ("how", "timeout"),
    [pytest.param({"die": True}, 30.0, id="dead"), pytest.param({"hang": 30}, 3.0, id="hung")],
)
def test_a_server_lost_in_generation_is_restarted_with_the_current_weights(
    how: dict[str, Any], timeout: float, start: Start, make_model: MakeModel, tmp_path: Path
) -> None:
    engine = start(replicas=2, request_timeout=timeout)
    engine.update_weights(make_model(seed=1), version=1)
    first = [replica.process.pid for replica in engine.replicas if replica.process]
    httpx2.post(
        f"{engine.replicas[0].client.url}/behave", json={"at": "/inference/v1/generate", **how}
    )
    require_current(sample(engine), tmp_path, 1)
    second = [replica.process.pid for replica in engine.replicas if replica.process]
    assert first[0] != second[0] and first[1] == second[1]
    with pytest.raises(ProcessLookupError):
        os.killpg(first[0], 0)
    assert engine.health()["engine_retries"] > 0


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
def test_a_server_lost_in_an_update_is_restarted_with_the_new_weights(
    path: str, start: Start, make_model: MakeModel, tmp_path: Path
) -> None:
    engine = start()
    behave(engine, at=path, die=True)
    engine.update_weights(make_model(seed=1), version=1)
    require_current(sample(engine), tmp_path, 1)
    engine.update_weights(make_model(seed=2), version=2)
    require_current(sample(engine), tmp_path, 2)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_server_of_ours_is_started_with_the_mode_that_is_needed(
    temperature: float, start: Start, tmp_path: Path
) -> None:
    engine = start(sampling=Sampling(max_new_tokens=6, temperature=temperature))
    require_current(sample(engine), tmp_path, 0)


def test_a_server_that_does_not_start_is_reported_with_its_last_words(start: Start) -> None:
    with pytest.raises(EngineError, match="ended while it started:\nfake: refused to start"):
        start(arguments=("--refuse",))


def test_a_server_that_never_answers_is_reported(start: Start) -> None:
    with pytest.raises(EngineError, match=r"127.0.0.1:9 does not answer after 0.5 s"):
        start(urls=("http://127.0.0.1:9",), start_timeout=0.5)


def test_the_development_endpoints_of_a_server_of_ours_are_open_to_this_machine_alone() -> None:
    config = EngineConfig(kind="vllm", python=Path("/other/python"), arguments=("--seed", "1"))
    words = server_command(config, torch.bfloat16, SAMPLING, Path("weights"), 1234)
    assert words[:5] == ["/other/python", "-m", "vllm.entrypoints.cli.main", "serve", "weights"]
    options = dict(pairwise(words))
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "1234")
    assert (options["--dtype"], options["--seed"]) == ("bfloat16", "1")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_server_on_a_cpu_computes_no_prompt_in_parts(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    words = server_command(EngineConfig(kind="vllm"), torch.float32, SAMPLING, Path("w"), 1)
    assert ("--no-enable-chunked-prefill" in words) == (not gpu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": ("http://10.0.0.5:8000",)}, "engine.urls: .*must not be open to other machines"),
        ({"urls": ("http://example.org",)}, "engine.urls: .*ssh tunnel"),
        ({"urls": ("https://127.0.0.1:80",)}, "engine.urls"),
        ({"urls": ("http://127.0.0.1.example.org",)}, "engine.urls"),
        ({"arguments": ("--host=0.0.0.0",)}, "engine.arguments: .*none that the trainer sets"),
        ({"arguments": ("--logprobs_mode", "raw_logprobs")}, "engine.arguments"),
        ({"arguments": ("--hos", "0.0.0.0")}, "engine.arguments: found '--hos'"),
        ({"kind": "vllm_colocated", "arguments": ("seed=3",)}, "engine.arguments: found 'seed=3'"),
        (
            {"urls": ("http://localhost:1",), "replicas": 2},
            "engine.replicas: .*without engine.urls",
        ),
        ({"urls": ("http://localhost:1",), "environment": {"A": "1"}}, "engine.environment"),
        ({"kind": "hf", "urls": ("http://localhost:1",)}, "engine.urls"),
        ({"kind": "hf", "sync_directory": Path("x")}, "engine.sync_directory"),
        ({"kind": "vllm_colocated", "weight_sync": "nccl"}, "engine.weight_sync"),
        ({"arguments": ("--tensor-parallel-size", "2")}, "engine.arguments"),
        ({"tensor_parallel": 0}, "engine.tensor_parallel: found 0, expected >= 1"),
        ({"urls": ("http://localhost:1",), "tensor_parallel": 2}, "engine.tensor_parallel"),
        ({"kind": "vllm_colocated", "shared": True}, "engine.shared"),
        ({"kind": "hf", "shared": True}, "engine.shared: .*engine.kind = 'vllm' beside it"),
        ({"tolerance": 0.0}, "engine.tolerance"),
        ({"start_timeout": math.inf}, "engine.start_timeout"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"kind": "vllm", **options})


def test_a_device_for_each_server(start: Start) -> None:
    with pytest.raises(EngineError, match=r"engine\.devices: found 1, expected one for each"):
        start(replicas=2, devices=("3",))


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({"shared": True, "sleep": True, "tensor_parallel": 4}, [["0,1,2,3"], []]),
        ({"shared": True, "sleep": True, "tensor_parallel": 2, "replicas": 2}, [["0,1", "2,3"]]),
        ({"shared": True, "tensor_parallel": 2, "devices": ("4,5",)}, [["4,5"]]),
        ({}, [["0"], ["1"], ["2"]]),
        ({"replicas": 1, "devices": ("7", "6", "5", "4")}, [["7"], ["6"]]),
    ],
)
def test_each_server_has_gpus_of_its_own(
    options: dict[str, Any], devices: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = EngineConfig(kind="vllm", **options)
    for rank, expected in enumerate(devices):
        acts = rank == 0 or not config.shared
        places = server_places(config, World(rank=rank, size=4)) if acts else []
        found = [server_environment(config, place)["CUDA_VISIBLE_DEVICES"] for place in places]
        assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shared": True, "sleep": True, "tensor_parallel": 2},
            "engine.tensor_parallel: found 1 x 2 GPUs .* beside 4 ranks, expected engine.repl",
        ),
        ({"tensor_parallel": 2}, "found 4 servers of 2 GPUs on a machine with 4, expected no more"),
        ({"devices": ("4", "5")}, "engine.devices: found 2, expected one for each server"),
        ({"urls": ("http://127.0.0.1:1",)}, "found 1 for 4 ranks, expected one each, or engine.sh"),
    ],
)
def test_servers_that_do_not_fit_the_ranks_are_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(EngineError, match=message):
        server_places(EngineConfig(kind="vllm", **options), World(rank=3, size=4))


def test_a_server_sees_its_device_and_nothing_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    shown = "import os; print(*(os.environ.get(n) for n in ('RANK', 'TORCHELASTIC_RUN_ID', 'A')))"
    process = ServerProcess([sys.executable, "-c", shown], {"A": "b"}, tmp_path / "log")
    deadline = time.monotonic() + 30
    while process.running and time.monotonic() < deadline:
        time.sleep(0.05)
    process.close()
    assert process.last_output() == "None None b"


PARENT = """
import sys, time
from pathlib import Path
from hsd.rollout.server_launch import server_command, server_environment, server_places
from hsd.rollout.server_process import ServerProcess
child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
both = f"import subprocess, sys, time; {deaf}; subprocess.Popen([sys.executable, '-c', {child!r}])"
ServerProcess([sys.executable, "-c", both + "; time.sleep(600)"], {}, Path(sys.argv[1]))
time.sleep(600)
"""


def test_a_server_and_its_workers_end_even_if_the_trainer_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(log)], env=environment)
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(log.read_text())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
