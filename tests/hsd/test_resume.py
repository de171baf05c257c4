"""A run that was stopped, killed or replayed is the run that was not, bit by bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hsd import train
from hsd.data.peers import Attempt, PeerConfig, PeerPolicy
from hsd.distributed.checkpoint import Checkpoints, load_tensors, whole_checkpoints
from hsd.distributed.process import World
from hsd.metrics import read_json_lines
from hsd.run import loop, resume, session

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]
Go = Callable[..., tuple[int, Path]]

ALONE = World(rank=0, size=1)
MEASURED = {
    "seconds",
    "rollout_seconds",
    "update_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
}
KILLS = int(os.environ.get("HSD_KILLS", "2"))

# Everything that a step leaves for later ones: two averages, momentum, a buffer, the stream.
STATEFUL = {
    "steps": 4,
    "checkpoint_every": 1,
    "objective": {
        "teacher": "ema",
        "teacher_decay": 0.9,
        "ref_refresh_every": 2,
        "ref_refresh_decay": 0.5,
        "ref_coef": 0.1,
        "group_filter": "mixed",
    },
    "peers": {"source": "buffer"},
    "rollout": {"questions_per_step": 6, "group_size": 3, "sampling_rounds": 2},
    "evaluation": {"samples": 2, "every": 2},
}


def sharded(
    *, offload: str = "none", offload_reference: bool = False, **changes: Any
) -> dict[str, Any]:
    sharding = {"mode": "full", "offload": offload, "offload_reference": offload_reference}
    return {"sharding": sharding, "warmup": {"steps": 0}, **changes}


@pytest.fixture
def go(tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd) -> Go:
    """`hsd train` of the tiny recipe with changes; its exit code and run folder."""

    def run(*flags: object, name: str = "run", **changes: Any) -> tuple[int, Path]:
        recipe = make_recipe(tmp_path / "recipe", {**STATEFUL, **changes})
        return run_hsd("train", recipe, "--run-dir", tmp_path / name, *flags), tmp_path / name

    return run


def history(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    records = read_json_lines(run / "metrics.jsonl")
    kept = [{k: v for k, v in record.items() if k not in MEASURED} for record in records]
    return kept, read_json_lines(run / "rollouts.jsonl")


def weights(run: Path) -> Mapping[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint")
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return state


def assert_same_run(found: Path, expected: Path) -> None:
    assert history(found) == history(expected)
    own, other = weights(found), weights(expected)
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def parts(folder: Path) -> set[str]:
    """The first words of the names of the tensors in a checkpoint."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= {name.split(".")[0] for name in opened.keys()}  # noqa: SIM118
    return names


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does something in the middle of a step, from 0."""
    original = loop.train_step

    def acting(trainer: Any, stream: Any, number: int, **options: Any) -> Any:
        result = original(trainer, stream, number, **options)
        if number == step:
            action()
        return result

    monkeypatch.setattr(loop, "train_step", acting)


@pytest.mark.parametrize(
    ("number", "code", "kind", "changes", "still"),
    [
        (signal.SIGTERM, 143, "llama", {}, set()),
        (signal.SIGINT, 130, "llama-tied", {}, set()),
        (
            signal.SIGTERM,
            143,
            "llama",
            {"objective": {"ref_coef": 0.1}, "rollout": {}},
            {"reference"},
        ),
        (
            signal.SIGTERM,
            143,
            "llama-tied",
            {"objective": {"teacher": "initial", "ref_refresh_every": 1}, "rollout": {}},
            {"teacher"},
        ),
        (signal.SIGTERM, 143, "llama-tied", {"adapter": {"rank": 2}}, {"model"}),
        (signal.SIGTERM, 143, "llama", sharded(offload="optimizer", offload_reference=True), set()),
        (
            signal.SIGTERM,
            143,
            "llama-tied",
            sharded(offload="all", offload_reference=True, objective={"ref_coef": 0.1}, rollout={}),
            {"reference"},
        ),
        (
            signal.SIGTERM,
            143,
            "llama-tied",
            sharded(offload="optimizer", adapter={"rank": 2}),
            {"model"},
        ),
    ],
)
def test_a_signal_ends_the_step_and_the_run_resumes_bit_by_bit(
    number: signal.Signals,
    code: int,
    kind: str,
    changes: dict[str, Any],
    still: set[str],
    go: Go,
    run_hsd: RunHsd,
    make_model: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    make_model(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = {"name": str(tmp_path / "model")}
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), number))
        status, run = go(checkpoint_every=0, model=model, **changes)
    assert status == code
    assert [step for step, _ in whole_checkpoints(run / "resume")] == [2]
    assert weights(run)
    assert parts(run / "resume" / "initial") == still
    assert run_hsd("train", "--resume", run) == 0
    assert not (run / "resume").exists()
    assert_same_run(run, go(name="whole", model=model, **changes)[1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_a_save_leaves_whole_checkpoints_alone(
    go: Go, run_hsd: RunHsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"peers": {}, "objective": {}, "rollout": {}, "steps": 3}
    original, sent = Checkpoints._commit, [0]

    def signalled(self: Checkpoints, *args: Any) -> None:
        if not sent[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        sent[0] += 1
        time.sleep(0.2)  # the main thread goes on, and leaves
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_commit", signalled)
        status, run = go(**plain)
    assert status == 143
    names = {path.name for path in (run / "resume").iterdir()} - {"initial"}
    assert names and all(name.startswith("step-") for name in names)
    assert run_hsd("train", "--resume", run) == 0
    assert_same_run(run, go(name="whole", **plain)[1])


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(
    go: Go, run_hsd: RunHsd, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = session._measure
    ended: list[bool] = []

    def signalled(trainer: Any) -> Any:
        result = original(trainer)
        os.kill(os.getpid(), signal.SIGTERM)
        ended.append(True)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(session, "_measure", signalled)
        status, run = go()
    assert (status, ended) == (143, [])
    assert run_hsd("train", "--resume", run) == 0
    assert_same_run(run, go(name="whole")[1])


@pytest.mark.parametrize("changes", [{}, {"adapter": {"rank": 2}}], ids=["all", "adapter"])
def test_a_killed_run_resumes_from_a_whole_checkpoint_bit_by_bit(
    changes: dict[str, Any], tmp_path: Path, go: Go, make_recipe: MakeRecipe
) -> None:
    """kill -9 at random moments of steps and of saves; HSD_KILLS of them."""
    recipe = make_recipe(tmp_path / "recipe", {**STATEFUL, **changes, "steps": 3 * KILLS})
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run(
        [sys.executable, script, recipe, tmp_path / "killed", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=60 + 30 * KILLS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CXX": "none", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == KILLS
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same_run(tmp_path / "killed", go(name="whole", steps=3 * KILLS, **changes)[1])
    finally:
        torch.set_num_threads(threads)


def test_what_changes_after_a_save_is_called_is_not_in_it(tmp_path: Path) -> None:
    value = torch.arange(1_000_000.0)
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(1, {"a": {"b": value}}, shared={}, own={}, still={})
    value.zero_()
    checkpoints.close()
    loaded = {"a": {"b": torch.empty(1_000_000)}}
    load_tensors(whole_checkpoints(tmp_path)[-1][1], loaded, ALONE)
    assert torch.equal(loaded["a"]["b"], torch.arange(1_000_000.0))


def test_what_never_changes_is_written_by_the_first_save_alone(tmp_path: Path) -> None:
    def save(step: int, value: float) -> float:
        checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
        still = {"a": torch.full((2,), value)}
        checkpoints.save(step, {"b": torch.ones(2)}, shared={}, own={}, still=still)
        checkpoints.close()
        found = {"a": torch.empty(2)}
        load_tensors(tmp_path / "initial", found, ALONE)
        return float(found["a"][0])

    assert [save(1, 1.0), save(2, 2.0)] == [1.0, 1.0]
    for _, path in whole_checkpoints(tmp_path):
        shutil.rmtree(path)
    # What was left by a run that was killed before its first checkpoint.
    assert save(1, 3.0) == 3.0


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, {"a": torch.ones(2)}, shared={}, own={}, still={})
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002", "step-00000010"}


def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(1, {"a": torch.ones(2)}, shared={}, own={}, still={})
    checkpoints.wait()

    def full(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hsd.distributed.checkpoint._sync", full)
    checkpoints.save(2, {"a": torch.zeros(2)}, shared={}, own={}, still={})
    with pytest.raises(OSError, match="disk full"):
        checkpoints.close()
    ((step, path),) = whole_checkpoints(tmp_path)
    loaded = {"a": torch.zeros(2)}
    load_tensors(path, loaded, ALONE)
    assert step == 1 and torch.equal(loaded["a"], torch.ones(2))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=1)
    checkpoints.save(1, {"a": torch.ones(2)}, shared={}, own={}, still={})
    checkpoints.close()
    for target in ({"a": torch.ones(3)}, {"b": torch.ones(2)}):
        with pytest.raises(ValueError, match="found no checkpoint of this run's model"):
            load_tensors(tmp_path / "step-00000001", target, ALONE)


def test_generators_go_on_where_they_were() -> None:
    state = json.loads(json.dumps(resume.own_state()))
    expected = torch.rand(4)
    torch.manual_seed(9)
    resume._restore_own(state, source="here")
    assert torch.equal(torch.rand(4), expected)


def test_the_buffer_of_successes_survives_json() -> None:
    def policy() -> PeerPolicy:
        return PeerPolicy(PeerConfig(source="buffer", buffer_size=2), seed=0)

    first, second = policy(), policy()
    attempts = [
        Attempt(
            question_id="q",
            step=step,
            index=0,
            text="t",
            token_ids=(step,),
            logprobs=(-0.1,),
            correct=True,
        )
        for step in range(3)
    ]
    first.remember(attempts)
    second.restore(json.loads(json.dumps(first.state())), source="here")
    failed = [dataclasses.replace(attempts[0], step=7, correct=False)]
    assert second.choose(failed) == first.choose(failed)
    assert second.choose(failed)[0].successes[0].step in (1, 2)
    with pytest.raises(ValueError, match="here: found no successes"):
        second.restore([{"question_id": "q"}], source="here")


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = poison(monkeypatch, {2})
    status, run = go(checkpoint_every=0, peers={}, objective={}, rollout={})
    assert status == 0 and calls[0] == 4
    steps = [record for record in history(run)[0] if record["kind"] == "step"]
    assert [step["skipped_updates"] for step in steps] == [0.0, 1.0, 0.0, 0.0]
    assert all(value.isfinite().all() for value in weights(run).values())


def test_after_the_limit_the_batch_is_dumped_and_replays_from_the_checkpoint(
    go: Go, run_hsd: RunHsd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"peers": {}, "objective": {}, "rollout": {}, "steps": 3}
    limit = ("--recovery.max-skipped-steps", 0)
    with monkeypatch.context() as patch:
        poison(patch, {3})
        status, run = go(*limit, checkpoint_every=0, **plain)
    assert status == 1
    assert "loss: found one that is not finite" in capsys.readouterr().out
    dumped = read_json_lines(run / "rollouts-of-step-3.jsonl")
    assert len(dumped) == 8 and {record["step"] for record in dumped} == {3}
    assert len(history(run)[1]) == 2 * 8
    replay = run / "rollouts-of-step-3.jsonl"
    assert run_hsd("train", "--resume", run, "--replay", replay) == 0
    _, whole = go(name="whole", checkpoint_every=0, **plain)
    assert history(run)[1] == history(whole)[1]
    found, expected = weights(run), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> list[int]:
    """A loss that is NaN in the given updates, from 1; how many there were."""
    original, count = train.accumulate_gradients, [0]

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        sums, gap = original(*args, **kwargs)
        count[0] += 1
        return (sums * float("nan") if count[0] in calls else sums), gap

    monkeypatch.setattr(train, "accumulate_gradients", poisoned)
    return count


def test_a_replay_is_the_run_bit_by_bit_and_samples_nothing(
    go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = go(checkpoint_every=0)
    assert any(not record["kept"] for record in history(run)[1])

    def sampled(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an engine or a verifier was made")

    monkeypatch.setattr("hsd.trainer.make_engine", sampled)
    monkeypatch.setattr("hsd.trainer.VerifierPool", sampled)
    status, replayed = go("--replay", run / "rollouts.jsonl", name="replayed", checkpoint_every=0)
    assert status == 0
    steps, rollouts = history(run)
    assert history(replayed) == ([r for r in steps if r["kind"] == "step"], rollouts)
    found, expected = weights(replayed), weights(run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_replay_of_another_run_is_one_line(
    go: Go, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = go("--replay", trained_run / "rollouts.jsonl", "--seed", 3)
    assert status == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "found 0 rollouts of a question of this step, expected 3" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--resume", "RUN"], "found no resume/ in RUN, expected an unfinished run"),
        (["--resume", "nowhere"], "found no config.json in nowhere"),
        (["--resume", "RUN", "--seed", "1"], "--resume: found '--seed' beside it"),
        (["--resume"], "--resume: found no value"),
        (["RECIPE", "--replay", "--seed", "1"], "--replay: found no value"),
        (["RECIPE", "--replay", "nowhere"], "replay: found no file nowhere"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    arguments: list[str],
    named: str,
    trained_run: Path,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"RUN": str(trained_run), "RECIPE": str(trained_run.parent / "tiny.toml")}
    assert run_hsd("train", *(paths.get(word, word) for word in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("hsd: error: ") and err.count("\n") == 1
    assert named.replace("RUN", paths["RUN"]) in err
