"""Recipes and command lines: what they say, and one clear line where they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hsd.config import Config
from hsd.data.task_configs import JsonlTask
from hsd.recipe import config_from_dict, load_recipe, parse_arguments, to_dict

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("**/*.toml"))

RunHsd = Callable[..., int]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(text: str, name: str = "recipe.toml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return to_file


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hsd: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_names_a_run_folder(path: Path) -> None:
    config = parse_arguments([str(path)], prog="hsd train")
    assert config.run_dir is not None and config.run_dir.name.startswith(path.stem)


def test_there_is_a_recipe_to_parse() -> None:
    assert RECIPES


def test_a_recipe_holds_what_differs_from_its_base(write: Callable[..., Path]) -> None:
    write("steps = 5\n[rollout]\ngroup_size = 4\ntop_p = 0.5\n", "grandparent.toml")
    write('base = "grandparent.toml"\nseed = 3\n[rollout]\ngroup_size = 6\n', "parent.toml")
    config = load_recipe(write('base = "parent.toml"\nseed = 4\n'))
    assert (config.steps, config.seed) == (5, 4)
    assert (config.rollout.group_size, config.rollout.top_p) == (6, 0.5)


def test_a_task_of_another_source_replaces_that_of_the_base(write: Callable[..., Path]) -> None:
    write("[task]\nsource = 'arithmetic'\nterms = 4\n", "base.toml")
    task = "[task]\nsource = 'jsonl'\ntrain = 'a.jsonl'\n"
    config = load_recipe(write(f"base = 'base.toml'\n{task}"))
    assert config.task == JsonlTask(train=Path("a.jsonl"))


def test_a_base_is_found_beside_its_recipe(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("steps = 5\n", "base.toml")
    recipe = write('base = "base.toml"\n')
    monkeypatch.chdir("/")
    assert load_recipe(recipe).steps == 5


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense = 1", "nonsense: unknown key, expected run_dir or seed or steps"),
        ("stesp = 1", "stesp: unknown key, expected steps\n"),
        ("[rollout]\ntemprature = 1.0", "rollout.temprature: unknown key, expected temperature\n"),
        (
            "[task]\nsource = 'jsonl'\ntrain = 'a'\nheldot = 'b'",
            "task.heldot: unknown key, expected heldout\n",
        ),
        ("[task]\nsource = 'arithmetic'\nfiles = 1", "task.files: unknown key, expected source"),
        ("steps = '3'", "steps: found '3'"),
        ("steps = 3.0", "steps: found 3.0"),
        ("steps = true", "steps: found True"),
        ("seed = 1979-05-27", "seed: found '1979-05-27'"),
        ("task = 3", "task: found 3"),
        ("[task]\nsource = 'nope'", "task: found {'source': 'nope'}"),
        ("[task]\nsource = 'jsonl'", "task.train: "),
        ("[model]\nname = 3", "model.name: found 3"),
        ("[evaluation]\nsplit = 'train'", "evaluation.split: found 'train'"),
        ("steps = -1", "steps: found -1"),
        ("seed = 2147483648", "seed: found 2147483648"),
        ("micro_batch_tokens = 0", "micro_batch_tokens: found 0"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size: found 1"),
        ("[rollout]\ntemperature = 0", "rollout.temperature: found 0"),
        ("[rollout]\ntop_p = 1.5", "rollout.top_p: found 1.5"),
        ("[objective]\nwindow = -1", "objective.window: found -1"),
        ("[objective]\nwindow = 'all'", "objective.window"),
        ("[warmup]\nhint_share = 1.5", "warmup.hint_share: found 1.5"),
        ("[objective]\nref_coef = nan", "objective.ref_coef: found nan"),
        ("[objective]\njsd_beta = 0.3", "objective.jsd_beta: found 0.3"),
        ("packing = 'dense'", "packing: found 'dense'"),
        (
            "[objective]\nmeasure_reference = false",
            "objective.measure_reference: found False, expected an objective.ref_coef of 0",
        ),
        ("[objective]\nmax_chunk_bytes = 0", "objective.max_chunk_bytes: found 0"),
        ("[objective]\nsparse_tolerance = 0.0", "objective.sparse_tolerance: found 0.0"),
        ("[objective]\nsparse_tolerance = 1.0", "objective.sparse_tolerance: found 1.0"),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate: found inf"),
        ("[optimizer]\nmax_grad_norm = 0", "optimizer.max_grad_norm: found 0"),
        ("[warmup]\nbatch_size = 0", "warmup.batch_size: found 0"),
        ("[evaluation]\nsamples = 0", "evaluation.samples: found 0"),
        ("[rollout]\nsampling_rounds = 2", "rollout.sampling_rounds: found 2"),
        ("[optimizer]\nupdates_per_step = 9", "optimizer.updates_per_step: found 9"),
        ("[sharding]\noffload = 'all'", "sharding.offload: found 'all'"),
        ("[sharding]\noffload_reference = true", "sharding.offload_reference: found True"),
        ("[sharding]\nmode = 'full'\n[warmup]\nsteps = 2", "warmup.steps: found 2, expected 0"),
        ("[context]\nfallback = 'policy_gradient'", "context.fallback: found 'policy_gradient'"),
        ("[context]\nshow_peer = false\nfallback = 'skip'", "context.fallback: found 'skip'"),
        ("[context]\nshow_peer = false\n[peers]\ncount = 2", "peers.count: found 2"),
        ("[peers]\nsource = 'other_prompt'\n[objective]\nwindow = 0", "peers.source: found"),
        ("[objective]\nref_coef = [[0, 1], [0, 2]]", "objective.ref_coef: found steps [0, 0]"),
        ("[context]\npeer_keep = 'ends'", "context.peer_keep: found 'ends'"),
        ("[context]\npeer_token_budget = 0", "context.peer_token_budget: found 0"),
        ("[task]\nterms = 1", "task.terms: found 1"),
        ("steps = [", "recipe.toml: "),
        ("base = 3", "base: found 3"),
        ("base = 'recipe.toml'", "base: found a recipe that is its own base"),
        ("base = 'missing.toml'", "missing.toml: no such recipe"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(
    text: str,
    named: str,
    write: Callable[..., Path],
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_hsd("train", write(text), "--dry-run") == 2
    assert named in one_line(capsys)


def test_two_recipes_that_are_each_others_base_are_refused(
    write: Callable[..., Path], run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    write("base = 'b.toml'", "a.toml")
    assert run_hsd("train", write("base = 'a.toml'", "b.toml"), "--dry-run") == 2
    assert "its own base" in one_line(capsys)


def test_every_fault_of_a_recipe_is_named_at_once(
    write: Callable[..., Path], run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hsd("train", write("steps = 'x'\nseeds = 1"), "--dry-run") == 2
    error = one_line(capsys)
    assert "steps: found 'x'" in error and "seeds: unknown key" in error


@pytest.mark.parametrize("recipe", ["missing.toml", ".", "--seed"])
def test_a_recipe_that_is_no_file_is_named(
    recipe: str, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hsd("train", recipe) == 2
    assert recipe in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--nope 3", "--nope, 3, expected options that --help shows"),
        ("--stpes 3", "--stpes, 3, expected --steps\n"),
        ("--objective.windw=3", "--objective.windw=3, expected --objective.window\n"),
        ("--rollout.nope=3", "--rollout.nope=3"),
        ("surplus", "surplus"),
        ("--steps x", "--steps: invalid literal for int() with base 10: 'x'"),
        ("--steps 1.5", "--steps"),
        ("--seed", "--seed"),
        ("--rollout.top-p half", "--rollout.top-p"),
        ("--rollout.group-size 1", "rollout.group_size: found 1"),
        ("--optimizer.learning-rate inf", "optimizer.learning_rate: found inf"),
        ("--evaluation.split train", "--evaluation.split"),
        ("--task.terms 99", "task.terms: found 99"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(
    flags: str,
    named: str,
    write: Callable[..., Path],
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_hsd("train", write("steps = 5"), *flags.split(), "--dry-run") == 2
    error = one_line(capsys)
    assert named in error
    assert "---" not in error and "helptext" not in error


def test_flags_go_before_the_recipe(write: Callable[..., Path]) -> None:
    recipe = write("seed = 1\n[rollout]\ngroup_size = 4\ntop_p = 0.5\n")
    flags = ["--seed", "7", "--rollout.group-size", "6", "--objective.window", "3"]
    config = parse_arguments([str(recipe), *flags], prog="hsd train")
    assert (config.seed, config.rollout.group_size, config.rollout.top_p) == (7, 6, 0.5)
    assert config.objective.window == 3


def test_a_flag_switches_the_window_off(write: Callable[..., Path]) -> None:
    recipe = write("[objective]\nwindow = 3\n")
    config = parse_arguments([str(recipe), "--objective.window", "none"], prog="hsd train")
    assert config.objective.window == "none"


def test_flags_reach_into_the_task_that_the_recipe_chose(write: Callable[..., Path]) -> None:
    recipe = write("[task]\nsource = 'jsonl'\ntrain = 'a.jsonl'\n")
    config = parse_arguments([str(recipe), "--task.heldout", "b.jsonl"], prog="hsd train")
    assert config.task == JsonlTask(train=Path("a.jsonl"), heldout=Path("b.jsonl"))


def test_dry_run_prints_the_configuration_and_runs_nothing(
    write: Callable[..., Path],
    run_hsd: RunHsd,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write("[task]\nsource = 'jsonl'\ntrain = 'a.jsonl'\n[objective]\nwindow = 0\n")
    run_dir = tmp_path / "run"
    flags = ["--seed", "7", "--run-dir", str(run_dir)]
    assert run_hsd("train", recipe, "--dry-run", *flags) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = parse_arguments([str(recipe), *flags], prog="hsd train")
    assert config_from_dict(shown, source="shown") == expected
    assert not run_dir.exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_configuration_survives_the_way_through_json(path: Path) -> None:
    config = load_recipe(path)
    assert config_from_dict(json.loads(json.dumps(to_dict(config))), source="json") == config


def test_a_configuration_of_defaults_needs_no_recipe() -> None:
    assert config_from_dict({}, source="nothing") == Config()


def test_run_folders_are_numbered_so_that_none_is_used_twice(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(write("seed = 5"))
    for name in ("recipe-seed5", "recipe-seed5-2", "recipe-seed5-3"):
        config = parse_arguments([recipe], prog="hsd train")
        assert config.run_dir == Path("runs") / name
        config.run_dir.mkdir(parents=True)


@pytest.mark.parametrize("words", [["train", "-h"], ["train", "RECIPE", "--help"]])
def test_help_shows_the_flags(
    words: list[str],
    write: Callable[..., Path],
    run_hsd: RunHsd,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = str(write("steps = 123"))
    assert run_hsd(*(recipe if word == "RECIPE" else word for word in words)) == 0
    out = capsys.readouterr().out
    assert "--rollout.group-size" in out
    assert ("(default: 123)" in out) == ("RECIPE" in words)


@pytest.mark.parametrize("command", ["train", "overlap", "eval", "credit", "report", "budget"])
def test_a_command_without_its_argument_is_bad_usage(
    command: str, run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hsd(command) == 2
    assert one_line(capsys)


@pytest.mark.parametrize("option", ["--dry-run", "--profile", "--resume=run"])
def test_options_of_train_are_none_of_overlap(
    option: str, write: Callable[..., Path], run_hsd: RunHsd, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hsd("overlap", write("steps = 5"), option) == 2
    assert option in one_line(capsys)
