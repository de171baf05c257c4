"""The quickstart with a real server, which is killed while it samples and while it is updated."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import psutil
import torch

from benchmarks.rollouts import compare
from hsd.cli import main as hsd_main
from hsd.rollout import guard
from hsd.rollout.vllm_client import ServerLost, VllmClient

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


def test_throughput_beside_the_transformers_engine(vllm_options, capsys):
    """Short rows of one length leave a server nothing to gain; uneven ones do, on any machine."""
    threads = torch.get_num_threads()
    least = {"quickstart": 0.5, "uneven": 3.0}
    ratios = {}
    for found in compare(vllm_options["python"], tuple(least), threads=threads, repeats=1):
        with capsys.disabled():
            print(f"\n{found.line()} ({threads} threads)")
        ratios[found.work.name] = found.ratio
    assert all(ratios[name] >= bound for name, bound in least.items()), ratios
