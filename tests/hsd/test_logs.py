"""TensorBoard files read back, the calls that Weights & Biases gets, and the table of rollouts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from hsd.logs.completions import CompletionRow, completions_table
from hsd.logs.config import LoggingConfig
from hsd.logs.trackers import open_trackers, scalars
from hsd.metrics import StepProgress, read_json_lines

MakeRecipe = Callable[..., Path]
RunHsd = Callable[..., int]


class FakeWandb(ModuleType):
    """The part of wandb's interface that is called, recorded."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.step_metrics: list[tuple[str, str]] = []
        self.finished = 0
        self.refuses = False

    def init(self, **arguments: Any) -> FakeWandb:
        if self.refuses:
            raise RuntimeError("no API key\nconfigured")
        self.begun.append(arguments)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.step_metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1

    class Table:
        def __init__(self, *, columns: list[str], data: list[list[Any]]) -> None:
            self.rows = [dict(zip(columns, row, strict=True)) for row in data]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("hsd.logs.trackers.find_spec", lambda name: fake)
    return fake


@pytest.fixture
def go(tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd) -> Callable[..., int]:
    """`hsd train` of the tiny recipe for one step, with these settings of logging."""

    def run(**logging: Any) -> int:
        changes = {"logging": {"completions_every": 1, **logging}, "show_samples": 3}
        recipe = make_recipe(tmp_path / "recipe", changes)
        return run_hsd("train", recipe, "--run-dir", tmp_path / "run", "--steps", 1)

    return run


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(
    go: Callable[..., int], tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert go(tensorboard=True) == 0
    reader = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    before, step, after = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    named = {f"train/{k}": step[k] for k in ("loss", "reward", "context_length", "grad_norm")}
    for name, value in named.items():
        (event,) = reader.Scalars(name)
        assert event.step == 1 and event.value == pytest.approx(value, rel=1e-6), name
    averages = [(event.step, event.value) for event in reader.Scalars("evaluation/avg")]
    assert averages == [(0, pytest.approx(before["avg"])), (1, pytest.approx(after["avg"]))]
    assert len(reader.Scalars("evaluation/pass_at/2")) == 2
    (table,) = reader.Tensors("completions/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    shown = [json.loads(line) for line in text.splitlines() if line.startswith('    {"question"')]
    assert len(shown) == 3
    records = {r["question"]: r for r in read_json_lines(tmp_path / "run" / "rollouts.jsonl")}
    for row in shown:
        assert row["question"] in records
        assert row["context_length"] > 0 and row["reward"] in (0.0, 1.0)
    (config,) = reader.Tensors("config/text_summary")
    assert '"wandb_mode": "online"' in config.tensor_proto.string_val[0].decode()


def test_weights_and_biases_gets_the_same(
    go: Callable[..., int], wandb: FakeWandb, tmp_path: Path
) -> None:
    assert go(wandb_project="sums", wandb_mode="offline") == 0
    (begun,) = wandb.begun
    assert begun["project"] == "sums" and begun["mode"] == "offline"
    assert begun["dir"] == str(tmp_path / "run") and begun["name"] == "run"
    assert begun["config"]["config"]["steps"] == 1
    assert wandb.step_metrics == [("*", "step")]
    assert wandb.finished == 1
    before, first, table, after = wandb.logged
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [each["step"] for each in wandb.logged] == [0, 1, 1, 1]
    assert before["evaluation/avg"] == metrics[0]["avg"]
    assert first["train/loss"] == metrics[1]["loss"]
    assert after["evaluation/pass_at/2"] == metrics[2]["pass_at"]["2"]
    rollouts = {
        (r["text"], r["context_length"], float(r["correct"]))
        for r in read_json_lines(tmp_path / "run" / "rollouts.jsonl")
    }
    rows = table["completions"].rows
    assert len(rows) == 3 and len({row["question"] for row in rows[:2]}) == 2
    assert {(r["completion"], r["context_length"], r["reward"]) for r in rows} <= rollouts


def test_a_run_that_goes_on_keeps_its_id(wandb: FakeWandb, tmp_path: Path) -> None:
    config = LoggingConfig(wandb_project="p")
    for _ in range(2):
        open_trackers(config, tmp_path, title="t", recorded={})
    first, second = wandb.begun
    assert first["id"] == second["id"] and first["resume"] == "allow"


def test_a_refusal_is_one_line_and_leaves_nothing(
    go: Callable[..., int],
    wandb: FakeWandb,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb.refuses = True
    assert go(wandb_project="sums") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "logging.wandb_project: found 'sums', which cannot be used (RuntimeError: no API" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("logging", "extra"),
    [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "p"}, "wandb")],
)
def test_a_missing_package_is_named_before_the_run(
    logging: Any,
    extra: str,
    go: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hsd.logs.trackers.find_spec", lambda name: None)
    assert go(**logging) == 2
    assert f'pip install "hsd-kernels[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_start_leaves_no_event_files(
    go: Callable[..., int], tmp_path: Path, make_recipe: MakeRecipe, run_hsd: RunHsd
) -> None:
    pytest.importorskip("tensorboard")
    changes = {"logging": {"tensorboard": True}, "model": {"name": "no/such/model"}}
    recipe = make_recipe(tmp_path / "recipe", changes)
    assert run_hsd("train", recipe, "--run-dir", tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()


def test_only_finite_numbers_are_scalars() -> None:
    values = {"loss": 1, "kl": float("nan"), "pass_at": {"1": 0.5}, "split": "heldout", "n": [1]}
    assert dict(scalars("step", values)) == {"train/loss": 1.0, "train/pass_at/1": 0.5}


def test_the_table_shows_model_text_as_it_is() -> None:
    row = CompletionRow(
        question="q",
        prompt="[bold]1 + 1?",
        completion="[red]2[/red] \\boxed{2}",
        reward=1.0,
        peer=None,
        tokens=17,
        context_length=None,
    )
    console = Console(width=120, file=io.StringIO())
    console.print(completions_table([row], title="rollouts"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("[bold]1 + 1?", "[red]2[/red] \\boxed{2}", "17", "none"):
        assert shown in text


STEP = {
    "reward": 0.5,
    "loss": 0.1234,
    "kl": 0.25,
    "ref_kl": 0.01,
    "peer_share": 0.75,
    "context_length": 91.4,
    "tokens_per_second": 512.0,
}
SHOWN = (
    "reward 0.50  loss 0.1234  KL 0.2500  KL to start 0.0100  with peer 75%  context 91  tok/s 512"
)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_view_shows_the_last_step(terminal: bool) -> None:
    """In a terminal in place, with the steps done and the time left; in a file a line a step."""
    file = io.StringIO()
    console = Console(width=80 if terminal else 200, file=file, force_terminal=terminal)
    with StepProgress(console, steps=8, label="train", done=2) as progress:
        progress.advance({"reward": 1.0}, step=3)
        progress.advance(STEP, step=4)
    text = file.getvalue()
    if terminal:
        bar, *numbers = text.rsplit("train", 1)[1].splitlines()
        assert "4/8" in bar and "left" in bar
        assert " ".join(" ".join(numbers).split()).startswith(" ".join(SHOWN.split()))
        assert "step 4:" not in text
    else:
        assert "step 3: reward 1.00\n" in text and f"step 4: {SHOWN}\n" in text


def test_a_run_shows_its_rollouts(go: Callable[..., int], capsys: Any) -> None:
    assert go() == 0
    shown = capsys.readouterr().out
    assert "step 1: reward" in shown
    _, title, table = shown.partition("rollouts of step 1")
    assert title
    for column in ("question", "completion", "reward", "peer", "tokens", "context"):
        assert column in table


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"completions_every": -1}, r"logging\.completions_every: found -1"),
        ({"wandb_project": ""}, r"logging\.wandb_project: found ''"),
        ({"wandb_project": "p", "wandb_mode": "on"}, r"logging\.wandb_mode: found 'on'"),
        ({"wandb_mode": "offline"}, r"logging\.wandb_mode: found 'offline', expected logging\.wan"),
    ],
)
def test_impossible_settings_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoggingConfig(**values)
