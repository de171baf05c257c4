"""The quickstart with a real server, which is killed while it samples and while it is updated."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import torch

from hsd.cli import main as hsd_main
from hsd.policy.precision import compute_dtype
from hsd.rollout import guard
from hsd.rollout.hf import HfEngine
from hsd.rollout.protocol import Sampling, stream_seed
from hsd.rollout.vllm_client import ServerLost, VllmClient
from hsd.rollout.vllm_server import VllmServerEngine

ROOT = Path(__file__).parents[2]
STEPS, QUESTIONS, GROUP = 3, 16, 4


class Killer:
    """Kills the server's process group during the nth call of a method of its client."""

    def __init__(self, monkeypatch, name: str, *, at: int, after: float) -> None:
        self.lost: list[str] = []
        self._calls = 0
        self._at, self._after = at, after
        original = getattr(VllmClient, name)

        def wrapped(client: VllmClient, *arguments, **options):
            self._calls += 1
            if self._calls == self._at:
                threading.Timer(self._after, kill_server, [client.url]).start()
            try:
                return original(client, *arguments, **options)
            except ServerLost as error:
                self.lost.append(str(error))
                raise

        monkeypatch.setattr(VllmClient, name, wrapped)


def kill_server(url: str) -> None:
    """Kills the process that listens there, and its group, without a word."""
    port = int(url.rsplit(":", 1)[1])
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if guard.__file__ in words and str(port) in words:
            os.killpg(process.pid, signal.SIGKILL)


def servers() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if guard.__file__ in (process.info["cmdline"] or [])
    ]


def test_no_sample_is_lost_when_a_server_is_killed(vllm_options, tmp_path, monkeypatch):
    evaluated = 50
    recipe = tmp_path / "vllm.toml"
    environment = vllm_options["environment"].items()
    variables = ", ".join(f"{key} = {json.dumps(value)}" for key, value in environment)
    recipe.write_text(
        f"""
        base = {json.dumps(os.path.relpath(ROOT / "recipes" / "quickstart.toml", tmp_path))}
        steps = {STEPS}
        [task]
        heldout_questions = {evaluated}
        [rollout]
        questions_per_step = {QUESTIONS}
        group_size = {GROUP}
        [evaluation]
        every = 0
        samples = 2
        [engine]
        kind = "vllm"
        python = {json.dumps(str(vllm_options["python"]))}
        arguments = {json.dumps(vllm_options["arguments"])}
        environment = {{ {variables} }}
        request_timeout = 120
        """,
        encoding="utf-8",
    )
    # The check at the start and the first evaluation ask for 1 + evaluated groups.
    sampling = Killer(monkeypatch, "generate", at=1 + evaluated + QUESTIONS // 2, after=0.0)
    loading = Killer(monkeypatch, "load", at=2, after=0.02)
    assert hsd_main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0
    assert sampling.lost and loading.lost, "a kill came too late to be noticed"
    assert servers() == []

    def lines(name: str) -> list[dict]:
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    rollouts = lines("rollouts.jsonl")
    assert len(rollouts) == STEPS * QUESTIONS * GROUP
    for each in rollouts:
        assert each["policy_version"] == each["step"] - 1
        assert len(each["token_ids"]) == len(each["logprobs"]) >= 1
    steps = [line for line in lines("metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == STEPS
    assert steps[-1]["engine_retries"] >= 1
    assert all(step["engine_gap_mean"] < 0.1 for step in steps)
    print({name: [step[name] for step in steps] for name in ("engine_gap_mean", "reward")})


def tokens_per_second(engine: HfEngine | VllmServerEngine, tokenizer) -> float:
    """Of 16 groups of 4 rollouts of up to 48 tokens."""
    prompts = [tokenizer(f"Write about the number {n}.")["input_ids"] for n in range(16)]

    def generate(sampling: Sampling, repeat: int) -> list:
        return engine.generate(
            prompts,
            seeds=[stream_seed(repeat, n) for n in range(len(prompts))],
            group_size=4,
            sampling=sampling,
        )

    generate(Sampling(max_new_tokens=2), 0)  # what is done once only
    started = time.perf_counter()
    groups = generate(Sampling(max_new_tokens=48), 1)
    count = sum(len(rollout.token_ids) for group in groups for rollout in group)
    return count / (time.perf_counter() - started)


def test_throughput_beside_the_transformers_engine(policy, start_engine, capsys):
    dtype = compute_dtype("auto")
    engine = start_engine(Sampling(max_new_tokens=48), dtype=dtype)
    vllm = tokens_per_second(engine, policy.tokenizer)
    engine.close()
    engine = HfEngine(policy.model, policy.tokenizer, compute_dtype=dtype, batch_rows=256)
    hf = tokens_per_second(engine, policy.tokenizer)
    with capsys.disabled():
        print(
            f"\nvllm {vllm:.0f} tokens/s, hf {hf:.0f} tokens/s, ratio {vllm / hf:.2f} "
            f"({torch.get_num_threads()} threads, {dtype})"
        )
    assert vllm > hf / 2  # as fast on two idle cores, twice as fast on one that is busy
