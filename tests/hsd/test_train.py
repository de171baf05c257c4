"""Whole runs of a tiny model: what they leave, that they repeat, and how they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsd import train, trainer
from hsd.data.questions import question_stream
from hsd.metrics import JsonLines, read_json_lines
from hsd.recipe import config_from_dict, parse_arguments
from hsd.run import loop, session

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]

TIMINGS = {"seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_bytes"}
ROLLOUT_FIELDS = {
    "step",
    "question",
    "index",
    "prompt",
    "text",
    "token_ids",
    "logprobs",
    "loss_mask",
    "finish_reason",
    "policy_version",
    "correct",
    "outcome",
    "kept",
    "peer",
    "divergence",
    "peers",
    "advantage",
    "context_length",
}


@pytest.fixture
def go(tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd) -> Callable[..., tuple[int, Path]]:
    """`hsd train` of the tiny recipe with changes; its exit code and run folder."""

    def run(*flags: object, name: str = "run", **changes: Any) -> tuple[int, Path]:
        recipe = make_recipe(tmp_path / "recipe", changes)
        return run_hsd("train", recipe, "--run-dir", tmp_path / name, *flags), tmp_path / name

    return run


def metrics(run: Path) -> list[dict[str, Any]]:
    records = read_json_lines(run / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(run) if record["kind"] == "step"]


def rollouts(run: Path) -> list[dict[str, Any]]:
    return read_json_lines(run / "rollouts.jsonl")


def weights(run: Path) -> Mapping[str, torch.Tensor]:
    state: Mapping[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        run / "checkpoint"
    ).state_dict()
    return state


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("hsd: error: ") and err.count("\n") == 1
    return err


def test_a_run_folder_holds_everything_and_no_more(trained_run: Path) -> None:
    assert {path.name for path in trained_run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "curves.png",
        "checkpoint",
    }
    assert (trained_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_is_recorded_with_versions_and_seed(trained_run: Path) -> None:
    recorded = json.loads((trained_run / "config.json").read_text())
    recipe = parse_arguments(
        [str(trained_run.parent / "tiny.toml"), "--run-dir", str(trained_run)], prog="hsd train"
    )
    assert config_from_dict(recorded["config"], source="config.json") == recipe
    assert recorded["config"]["seed"] == 0
    assert recorded["versions"]["torch"] == torch.__version__
    assert recorded["versions"].keys() >= {"hsd-kernels", "transformers", "tokenizers"}
    assert recorded["python"] and recorded["processor"] and recorded["cores"]


def test_metrics_hold_every_step_between_two_evaluations(trained_run: Path) -> None:
    records = read_json_lines(trained_run / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("evaluation", 3),
    ]
    assert all(value is not None for record in records for value in record.values())
    for record in (records[0], records[-1]):
        counts = record["correct_per_question"]
        assert record["questions"] == len(counts) == 4
        assert record["avg"] == pytest.approx(sum(counts) / 8)
        assert record["pass"] == pytest.approx(sum(count > 0 for count in counts) / 4)


def test_every_rollout_is_recorded_with_every_field(trained_run: Path) -> None:
    records = rollouts(trained_run)
    assert len(records) == 3 * 2 * 4
    for record in records:
        assert record.keys() == ROLLOUT_FIELDS
        count = len(record["token_ids"])
        assert count == len(record["logprobs"]) == len(record["loss_mask"])
        assert record["policy_version"] == record["step"] - 1
        assert re.fullmatch(r"train:\d+", record["question"])
        assert (record["peer"] is None) == (record["divergence"] is None)


def test_step_metrics_are_those_of_the_rollouts(trained_run: Path) -> None:
    for step in steps(trained_run):
        own = [record for record in rollouts(trained_run) if record["step"] == step["step"]]
        tokens = sum(len(record["token_ids"]) for record in own)
        assert step["reward"] == sum(record["correct"] for record in own) / 8
        assert step["peer_share"] == sum(record["peer"] is not None for record in own) / 8
        assert step["context_length"] == sum(record["context_length"] for record in own) / 8
        assert step["failed_with_peer_share"] == pytest.approx(
            sum(record["peer"] is not None and not record["correct"] for record in own) / 8
        )
        assert step["generated_tokens"] == tokens
        assert step["response_length"] == tokens / 8
        assert step["cut_share"] == sum(r["finish_reason"] == "length" for r in own) / 8
        assert step["weight"] == pytest.approx(1)
        assert step["engine_gap_max"] < 1e-4


def test_the_run_has_mixed_groups_to_learn_from(trained_run: Path) -> None:
    assert any(step["failed_with_peer_share"] > 0 for step in steps(trained_run))


def test_the_first_step_starts_at_the_initial_weights_and_leaves_them(trained_run: Path) -> None:
    first, *others = steps(trained_run)
    assert first["ref_kl"] == 0.0
    assert all(step["ref_kl"] > 0.0 for step in others)


def test_peers_are_successes_of_the_same_group(trained_run: Path) -> None:
    groups: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for record in rollouts(trained_run):
        groups.setdefault((record["step"], record["question"]), {})[record["index"]] = record
    for group in groups.values():
        for index, record in group.items():
            others = [i for i, other in group.items() if other["correct"] and i != index]
            assert record["peer"] in others if others else record["peer"] is None


def test_transformers_loads_the_checkpoint_and_its_tokenizer(trained_run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_run / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(trained_run / "checkpoint")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Draw 3."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    text = tokenizer.decode(
        model.generate(prompt, max_new_tokens=4, do_sample=False)[0, prompt.shape[1] :],
        skip_special_tokens=True,
    )
    assert text in ("1", "2")


def test_the_same_seed_repeats_a_run_bit_by_bit_and_another_does_not(
    go: Callable[..., tuple[int, Path]],
) -> None:
    runs = [
        go("--seed", seed, name=name)[1]
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    ]
    assert metrics(runs[0]) == metrics(runs[1])
    assert rollouts(runs[0]) == rollouts(runs[1])
    first, second, other = map(weights, runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(runs[0]) != metrics(runs[2])
    assert rollouts(runs[0]) != rollouts(runs[2])
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_seed_reaches_every_rollout(go: Callable[..., tuple[int, Path]]) -> None:
    flags = ["--steps", 1, "--warmup.steps", 0, "--rollout.questions-per-step", 16]
    first, other = (
        {
            (record["question"], record["index"]): record["token_ids"]
            for record in rollouts(go("--seed", seed, *flags, name=f"seed{seed}")[1])
        }
        for seed in (0, 1)
    )
    assert first.keys() == other.keys()
    assert not any(first[key] == other[key] for key in first)


def test_neither_micro_batches_nor_generation_batches_change_a_run(
    go: Callable[..., tuple[int, Path]],
) -> None:
    _, one = go("--micro-batch-tokens", 1, "--rollout.batch-rows", 1, name="one")
    _, many = go("--micro-batch-tokens", 100_000, name="many")
    token_ids = [[record["token_ids"] for record in rollouts(run)] for run in (one, many)]
    assert token_ids[0] == token_ids[1]
    for step, other in zip(steps(one), steps(many), strict=True):
        del step["kind"], other["kind"]
        assert step == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_control_without_context_stays_where_it_is(
    go: Callable[..., tuple[int, Path]],
) -> None:
    control = {"show_answer": False, "show_peer": False}
    _, run = go(context=control)
    assert [step["kl"] for step in steps(run)] == [0.0] * 3
    # GEMMs of different shapes round the reference's logits differently: not exactly zero.
    assert max(step["grad_norm"] for step in steps(run)) < 1e-6
    first, *_, last = metrics(run)
    assert first["correct_per_question"] == last["correct_per_question"]


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"window": 0}},
        {"objective": {"mask": "failures", "teacher": "initial", "divergence": "jsd"}},
        {"context": {"fallback": "skip"}, "rollout": {"temperature": 0.7, "top_p": 0.9}},
        {"model": {"compute_dtype": "bfloat16"}},
        {"warmup": {"steps": 0}},
    ],
    ids=json.dumps,
)
def test_variants_run(changes: dict[str, Any], go: Callable[..., tuple[int, Path]]) -> None:
    status, run = go("--steps", 1, **changes)
    assert status == 0
    (step,) = steps(run)
    assert step["weight"] <= 1 + 1e-6
    assert weights(run)


def test_a_packed_run_is_the_padded_one(go: Callable[..., tuple[int, Path]]) -> None:
    objective = {"ref_coef": 0.0}  # the packed run does not measure its KL either
    _, padded = go("--packing", "padded", objective=objective, name="padded")
    _, packed = go(
        "--packing", "packed", objective={**objective, "measure_reference": False}, name="packed"
    )
    token_ids = [[record["token_ids"] for record in rollouts(run)] for run in (padded, packed)]
    assert token_ids[0] == token_ids[1]
    for step, other in zip(steps(packed), steps(padded), strict=True):
        del step["kind"], other["kind"], other["ref_kl"]
        assert step == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_evaluations_and_checkpoints_come_when_asked_for(
    go: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original = loop.RunFolder.checkpoint

    def recorded(self: Any, *arguments: Any) -> None:
        saved.append(len(steps(self.path)))
        original(self, *arguments)

    monkeypatch.setattr(loop.RunFolder, "checkpoint", recorded)
    _, run = go("--steps", 4, "--evaluation.every", 2, "--checkpoint-every", 3, "--warmup.steps", 0)
    assert [r["step"] for r in metrics(run) if r["kind"] == "evaluation"] == [0, 2, 4]
    assert saved == [3, 4]


def test_a_run_without_steps_measures_and_saves_the_model(
    go: Callable[..., tuple[int, Path]],
) -> None:
    status, run = go("--steps", 0)
    assert status == 0
    assert [record["kind"] for record in metrics(run)] == ["evaluation", "evaluation"]
    assert weights(run)


def test_the_terminal_shows_configuration_progress_samples_and_accuracy(
    go: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    go()
    out = capsys.readouterr().out
    for shown in (
        '"group_size": 4',
        "warm-up",
        "step 3: reward",
        "KL to start",
        "with peer",
        "tok/s",
        "samples before training",
        "samples after training",
        "Draw 16.",
        "heldout accuracy",
        "pass@2",
        "change of avg@2 over training",
        "run folder: ",
    ):
        assert shown in out


@pytest.mark.parametrize(
    ("changes", "file", "named"),
    [
        ({"model": {"name": "/no/such/model"}}, None, "model.name: found '/no/such/model'"),
        ({"task": {"train": "/no/such/file.jsonl"}}, None, "/no/such/file.jsonl"),
        ({}, ("train.jsonl", ""), "train.jsonl: found no question"),
        ({}, ("train.jsonl", '{"prompt": "a", "answer": "1"}\n{"prompt"\n'), "train.jsonl:2: "),
        ({}, ("heldout.jsonl", "\n"), "heldout.jsonl: found no question"),
        (
            {},
            ("train.jsonl", '{"prompt": "a", "answer": "1"}\n'),
            "warmup.steps: question 'train:1' has no solution",
        ),
        ({"evaluation": {"split": "validation"}}, None, "evaluation.split: found no question"),
        ({"context": {"template": "nope"}}, None, "nope"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_run_that_cannot_start_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    file: tuple[str, str] | None,
    named: str,
    tmp_path: Path,
    make_recipe: MakeRecipe,
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(tmp_path / "recipe", changes)
    if file is not None:
        (recipe.parent / file[0]).write_text(file[1])
    assert run_hsd("train", recipe, "--run-dir", tmp_path / "run") == 2
    assert named in one_line(capsys)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_folder_in_use_is_refused_and_left_alone(
    tmp_path: Path, go: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, run = go()
    assert status == 2
    assert "run_dir: found" in one_line(capsys)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


def test_a_file_in_place_of_the_folder_is_refused(
    tmp_path: Path, go: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert go()[0] == 2
    assert "run_dir: found" in one_line(capsys)
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path: Path, go: Callable[..., tuple[int, Path]]) -> None:
    (tmp_path / "run").mkdir()
    assert go("--steps", 0, "--warmup.steps", 0)[0] == 0


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, *, module: ModuleType = train
) -> None:
    """Ctrl-C in the given call, from 1, of a function that a module uses."""
    calls, original = 0, getattr(module, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize(
    ("name", "call", "done"),
    [
        ("accumulate_gradients", 1, 0),
        ("judge", 4, 1),
        ("accumulate_gradients", 3, 2),
        ("clipped_step", 3, 2),
        ("_measure", 1, 0),
        ("_measure", 2, 3),
    ],
)
def test_an_interrupt_leaves_a_checkpoint_and_whole_files(
    name: str,
    call: int,
    done: int,
    go: Callable[..., tuple[int, Path]],
    run_hsd: RunHsd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, name, call, module=session if name == "_measure" else train)
        status, run = go()
    assert status == 130
    assert len(steps(run)) == done
    assert len(rollouts(run)) == done * 8
    assert (run / "curves.png").is_file()
    assert run_hsd("eval", run, "--samples", 1) == 0


def test_an_interrupted_run_holds_the_weights_of_its_last_whole_step(
    go: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, "clipped_step", 3)
    _, interrupted = go(name="interrupted")
    monkeypatch.undo()
    _, whole = go("--steps", 2, name="whole")
    found, expected = weights(interrupted), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_interrupt_before_the_first_evaluation_leaves_nothing(
    go: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, "warm_up", 1, module=trainer)
    status, run = go()
    assert status == 130
    assert not run.exists()


def test_a_gradient_that_is_not_finite_leaves_the_last_good_weights(
    go: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.accumulate_gradients

    def poisoned(policy: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(policy, *args, **kwargs)
        next(policy.model.parameters()).grad[0, 0] = torch.nan
        return result

    monkeypatch.setattr(train, "accumulate_gradients", poisoned)
    status, run = go("--recovery.max-skipped-steps", 1)
    assert status == 1
    assert [step["skipped_updates"] for step in steps(run)] == [1.0]
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_fault_in_a_step_keeps_its_traceback(
    go: Callable[..., tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a user gave becomes a line and exit code 2."""

    def faulty(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(train, "accumulate_gradients", faulty)
    with pytest.raises(ValueError, match="a bug"):
        go()


def test_questions_come_in_a_seeded_order_epoch_after_epoch() -> None:
    def first(count: int, seed: int) -> list[Any]:
        stream = question_stream(range(5), seed)  # type: ignore[arg-type]
        return [next(stream) for _ in range(count)]

    two_epochs = first(10, 0)
    assert sorted(two_epochs[:5]) == sorted(two_epochs[5:]) == list(range(5))
    assert two_epochs[:5] != two_epochs[5:]
    assert first(10, 0) == two_epochs != first(10, 1)


def test_jsonl_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.write({"a": float("nan"), "b": [1.0, float("inf")], "c": "ä\u2028\n"})
    assert read_json_lines(tmp_path / "lines.jsonl") == [
        {"a": None, "b": [1.0, None], "c": "ä\u2028\n"}
    ]
    lines.close()


def test_a_broken_jsonl_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: "):
        read_json_lines(tmp_path / "lines.jsonl")
