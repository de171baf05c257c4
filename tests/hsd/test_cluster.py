"""The launch files, with programs that print their arguments in the place of torchrun and srun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsd.config import Config
from hsd.distributed.budget.architecture import load_architecture
from hsd.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LARGE = sorted((ROOT / "recipes").glob("qwen3*.toml"))


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for PATH."""
    bodies = {
        "torchrun": 'printf "%s\\n" "$@"',
        "srun": 'shift; "$@"',
        "scontrol": "echo n0; echo n1",
    }
    for name, body in bodies.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    return tmp_path


def launched(script: str, programs: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        ["bash", ROOT / "cluster" / script, "recipe.toml", "--seed", "1"],
        env={"PATH": f"{programs}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_torchrun_by_hand(programs: Path) -> None:
    words = launched("torchrun.sh", programs, NODES="4", NODE="2", MAIN="n0:29500")
    assert words[-5:] == ["-m", "hsd.train", "recipe.toml", "--seed", "1"]
    options = dict(zip(words[:-5:2], words[1:-5:2], strict=True))
    assert options["--nnodes"] == "4"
    assert options["--node-rank"] == "2"
    assert options["--nproc-per-node"] == "8"
    assert options["--rdzv-endpoint"] == "n0:29500"
    assert options["--max-restarts"] == "0"


def test_torchrun_by_hand_wants_to_know_where_it_is(programs: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        launched("torchrun.sh", programs, NODES="4", NODE="2")
    assert "MAIN: HOST:PORT of machine 0" in failure.value.stderr


def test_machines_have_the_numbers_that_they_were_given(tmp_path: Path) -> None:
    """Two machines of one rank each, both here; the second is started first."""
    package = tmp_path / "hsd"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import os, sys\nprint(sys.argv[1], os.environ['GROUP_RANK'], os.environ['RANK'])\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        main = f"localhost:{free.getsockname()[1]}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    machines = []
    for node in ("1", "0"):
        given = {"NODES": "2", "NODE": node, "MAIN": main, "GPUS": "1", "PATH": path}
        words = ["bash", ROOT / "cluster" / "torchrun.sh", f"machine-{node}"]
        machines.append(
            subprocess.Popen(words, env=given, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        )
        time.sleep(1)
    found = [machine.communicate(timeout=120)[0].split() for machine in machines]
    assert found == [["machine-1", "1", "1"], ["machine-0", "0", "0"]]


def test_slurm(programs: Path) -> None:
    words = launched(
        "slurm.sbatch",
        programs,
        SLURM_JOB_NODELIST="n[0-1]",
        SLURM_JOB_ID="123456",
        SLURM_JOB_NUM_NODES="2",
        SLURM_GPUS_ON_NODE="4",
    )
    options = dict(zip(words[:-5:2], words[1:-5:2], strict=True))
    assert options["--nnodes"] == "2"
    assert options["--nproc-per-node"] == "4"
    assert options["--rdzv-endpoint"] == "n0:23456"
    assert words[-3:] == ["recipe.toml", "--seed", "1"]


@pytest.mark.parametrize("path", LARGE, ids=[path.stem for path in LARGE])
def test_a_large_recipe_is_a_sharded_run_of_a_known_model(path: Path) -> None:
    config = load_recipe(path)
    assert load_architecture(config.model.name).vocab_size == 151_936
    assert config.sharding.mode == "full"
    assert config.sharding.activation_checkpointing
    assert config.objective == Config().objective  # HSD as published
    assert config.rollout.max_new_tokens == 16_384
