"""The dispatcher: its exit codes, its one-line errors, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import hsd
from hsd import cli

Command = Callable[[list[str]], int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], None]:
    """Put a function in the place of ``hsd.train.main``."""

    def install(main: Command) -> None:
        module = ModuleType("hsd.train")
        vars(module)["main"] = main
        monkeypatch.setitem(sys.modules, "hsd.train", module)

    return install


def test_arguments_and_status_pass_through(command: Callable[[Command], None]) -> None:
    seen: list[str] = []

    def main(argv: list[str]) -> int:
        seen.extend(argv)
        return 7

    command(main)
    assert cli.main(["train", "recipe.toml", "--seed", "1"]) == 7
    assert seen == ["recipe.toml", "--seed", "1"]


def test_interruption_exits_130(command: Callable[[Command], None]) -> None:
    def main(argv: list[str]) -> int:
        raise KeyboardInterrupt

    command(main)
    assert cli.main(["train"]) == 130


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("no", name="hsd.gone"), ImportError("no"), OSError("no")]
)
def test_errors_of_a_command_are_not_masked(
    command: Callable[[Command], None], error: Exception
) -> None:
    def main(argv: list[str]) -> int:
        raise error

    command(main)
    with pytest.raises(type(error)) as caught:
        cli.main(["train"])
    assert caught.value is error


@pytest.mark.parametrize("argv", [[], ["trian"], ["--verbose", "train"]])
def test_bad_usage_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "train or eval" in err
    assert not argv or argv[0] in err


def test_missing_modules_are_named_before_the_command_runs(
    command: Callable[[Command], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(lambda argv: pytest.fail("the command ran"))
    monkeypatch.setattr(cli, "TRAIN_MODULES", ("sys", "module_not_there"))
    assert cli.main(["train", "recipe.toml"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "module_not_there" in err and 'pip install "hsd-kernels[train]"' in err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"hsd {hsd.__version__}\n"


def test_runs_as_a_module_and_imports_nothing_heavy() -> None:
    code = "import sys, hsd.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
    run = subprocess.run([sys.executable, "-m", "hsd", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"hsd {hsd.__version__}\n")
