"""What users install: both distributions hold the packages, and torch is all the library needs.

Nothing is downloaded. Distributions are built by the backend of this environment and installed
into fresh environments, which see this one's torch, with its dependencies, and nothing else of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hsd
from hsd.cli import COMMANDS, TRAIN_MODULES

ROOT = Path(__file__).parents[2]
PACKAGES = ("hsd", "hsd_kernels")
MODULES = {
    path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")
}
DATA = {"hsd/py.typed", "hsd_kernels/py.typed", "hsd/data/templates.toml"} | {
    path.relative_to(ROOT).as_posix()
    for folder in ("hsd/credit/page", "hsd/distributed/budget/architectures")
    for path in (ROOT / folder).iterdir()
}

pytestmark = pytest.mark.slow


class Distributions(NamedTuple):
    sdist: Path
    wheel: Path  # built from the tree
    wheel_of_sdist: Path


class Environment(NamedTuple):
    python: Path
    variables: dict[str, str]

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a script of the environment, or its Python, in a folder without the sources."""
        return subprocess.run(
            [self.python.parent / command[0], *command[1:]],
            capture_output=True,
            text=True,
            env=self.variables,
            cwd=self.python.parent,
        )


def run(*command: str | Path, **variables: str) -> None:
    """Run a command that has to succeed."""
    done = subprocess.run(
        [*command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**clean_environment(), **variables},
    )
    assert done.returncode == 0, done.stdout


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def installed(*names: str) -> Iterator[metadata.Distribution]:
    """The named distributions of this environment and all that they require."""
    pending = [Requirement(name) for name in names]
    seen = set()
    while pending:
        wanted = pending.pop()
        key = (canonicalize_name(wanted.name), *sorted(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        distribution = metadata.distribution(wanted.name)
        yield distribution
        for requirement in map(Requirement, distribution.requires or ()):
            marker = requirement.marker
            extras = ("", *wanted.extras)
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                pending.append(requirement)


def link(folder: Path, *names: str) -> Path:
    """A folder for ``sys.path`` that holds links to those distributions only."""
    folder.mkdir()
    for distribution in installed(*names):
        for top in {file.parts[0] for file in distribution.files or ()}:
            target = folder / top
            if top not in ("..", "__pycache__") and not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def members(path: Path) -> dict[str, bytes]:
    """Files of a wheel or an sdist by name; an sdist's top folder is left out of the names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    files = {}
    with tarfile.open(path) as sdist:
        for member in sdist.getmembers():
            stream = sdist.extractfile(member)
            if stream is not None:
                files[member.name.partition("/")[2]] = stream.read()
    return files


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("distributions")
    build = (sys.executable, "-m", "build", "--no-isolation", ROOT, "--outdir")
    run(*build, folder / "both")
    run(*build, folder / "tree", "--wheel")
    (sdist,) = (folder / "both").glob("*.tar.gz")
    (wheel_of_sdist,) = (folder / "both").glob("*.whl")
    (wheel,) = (folder / "tree").glob("*.whl")
    return Distributions(sdist, wheel, wheel_of_sdist)


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def environment(
    request: pytest.FixtureRequest,
    distributions: Distributions,
    tmp_path_factory: pytest.TempPathFactory,
) -> Environment:
    """A fresh environment with the distribution under test and torch."""
    folder = tmp_path_factory.mktemp(request.param)
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    artifact: Path = getattr(distributions, request.param)
    backend = link(folder / "backend", "hatchling")
    run(*pip, "--no-build-isolation", artifact, PYTHONPATH=str(backend))
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(f"{link(folder / 'torch', 'torch')}\n")
    return Environment(python, clean_environment())


@pytest.mark.parametrize("kind", Distributions._fields)
def test_contents(distributions: Distributions, kind: str) -> None:
    names = set(members(getattr(distributions, kind)))
    assert names >= MODULES | DATA
    assert any(Path(name).name == "LICENSE" for name in names)
    assert not [name for name in names if "tests" in Path(name).parts or name.endswith(".pyc")]


def test_a_wheel_holds_nothing_but_the_packages(distributions: Distributions) -> None:
    tops = {name.partition("/")[0] for name in members(distributions.wheel)}
    assert tops == {*PACKAGES, f"hsd_kernels-{hsd.__version__}.dist-info"}


def test_the_sdist_builds_the_same_wheel(distributions: Distributions) -> None:
    assert members(distributions.wheel_of_sdist) == members(distributions.wheel)


def test_the_library_requires_torch_only(distributions: Distributions) -> None:
    wheel = members(distributions.wheel)
    text = wheel[f"hsd_kernels-{hsd.__version__}.dist-info/METADATA"].decode()
    requirements = [
        Requirement(line.partition(": ")[2])
        for line in text.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    assert [r.name for r in requirements if "extra ==" not in str(r.marker)] == ["torch"]


def test_the_command_looks_for_all_that_its_extra_installs() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, project["optional-dependencies"]["train"])
    wanted = {
        r.name.replace("-", "_") for r in requirements if r.marker is None or r.marker.evaluate()
    }
    assert set(TRAIN_MODULES) == wanted


def test_the_library_imports_beside_torch_alone(environment: Environment) -> None:
    code = "import hsd_kernels, sys; print(hsd_kernels.__file__); print('numpy' in sys.modules)"
    done = environment.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    path, numpy_imported = done.stdout.split()
    assert Path(path).is_relative_to(environment.python.parents[1])
    assert numpy_imported == "False"


@pytest.mark.parametrize("command", [("hsd",), ("python", "-m", "hsd")])
def test_the_trainer_names_its_extra(environment: Environment, command: tuple[str, ...]) -> None:
    for name in COMMANDS:
        done = environment.run(*command, name, "recipe.toml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "hsd-kernels[train]" in done.stderr and "transformers" in done.stderr
    done = environment.run(*command, "--version")
    assert (done.returncode, done.stdout) == (0, f"hsd {hsd.__version__}\n")
