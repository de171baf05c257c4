"""A head or a sequence that lies on several ranks, against one process with the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernel_problems
import pytest
import torch
from cases import (
    CASES,
    LEARNED,
    OURS,
    SPLITS,
    STATISTICS,
    coupled,
    own_arguments,
    own_tokens,
    problem,
)
from kernel_problems import cast, relative_error, truth
from safetensors.torch import load_file

from hsd_kernels import fused_token_loss, vocab_statistics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(SPLITS))
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    size = request.param
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CXX": "none",
        "PYTHONPATH": os.pathsep.join(
            [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ran = subprocess.run(
        [*command, f"--nproc-per-node={size}", str(here / "rank.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr
    return size, folder


@pytest.mark.gradient
@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(solved, case):
    size, folder = solved
    given = problem(case)
    expected = truth({name: value for name, value in given.items() if name not in OURS})
    for split in SPLITS[size]:
        ranks = [formed(folder / f"{split}-{case}-{rank}.safetensors") for rank in range(size)]
        for found in ranks:
            torch.testing.assert_close(found["loss"].double(), expected.loss, rtol=1e-5, atol=1e-7)
            assert_gradient(found["grad.student_hidden"], expected.gradients["student_hidden"])
        for name in LEARNED[1:]:
            whole = torch.cat([found[f"grad.{name}"] for found in ranks])
            assert_gradient(whole, expected.gradients[name])
            assert whole[37:].count_nonzero() == 0
        for name in ("kl", "ref_kl", "logprob", "entropy", "lse", "top1_agree"):
            wanted = getattr(expected.stats, name)
            for found in ranks if wanted is not None else []:
                torch.testing.assert_close(
                    found[f"stats.{name}"].double(), wanted, rtol=1e-4, atol=1e-6, equal_nan=True
                )


@pytest.mark.gradient
@pytest.mark.parametrize("case", CASES)
def test_tokens_of_a_sequence_on_several_ranks_add_up(solved, case):
    size, folder = solved
    expected = truth({name: v for name, v in problem(case).items() if name not in OURS})
    hidden = torch.zeros_like(expected.gradients["student_hidden"])
    for rank in range(size):
        found = formed(folder / f"tokens-{case}-{rank}.safetensors")
        torch.testing.assert_close(found["loss"].double(), expected.loss, rtol=1e-5, atol=1e-7)
        for name in LEARNED[1:]:
            assert_gradient(found[f"grad.{name}"], expected.gradients[name])
        hidden[own_tokens(size, rank)] = found["grad.student_hidden"].to(hidden.dtype)
    assert_gradient(hidden, expected.gradients["student_hidden"])


def formed(path: Path) -> dict[str, torch.Tensor]:
    """What a rank saved of one case; of its gradients, what mutations leave of them."""
    found = load_file(path)
    own = {n.removeprefix("grad."): v for n, v in found.items() if n.startswith("grad.")}
    altered = kernel_problems.received(own)
    return found | {f"grad.{name}": gradient for name, gradient in altered.items()}


def assert_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(found, expected) <= 1e-5


def assert_whole(folder: Path, size: int, case: str, expected: dict[str, torch.Tensor]) -> None:
    """Gradients, loss and statistics of every split, of one process by name."""
    for split in SPLITS[size]:
        ranks = [formed(folder / f"{split}-{case}-{rank}.safetensors") for rank in range(size)]
        for name, wanted in expected.items():
            if name in ("grad.weight", "grad.bias"):
                assert_gradient(torch.cat([found[name] for found in ranks]), wanted)
                continue
            for found in ranks:
                assert_gradient(found[name], wanted)


@pytest.mark.gradient
def test_statistics_and_their_gradient_are_those_of_the_whole_vocabulary(solved):
    size, folder = solved
    given = cast(problem("forward_kl"), torch.float64)
    leaves = {name: given[name].requires_grad_() for name in LEARNED}
    values = coupled(given | {"backend": "reference"}, vocab_statistics)
    values["loss"].backward()
    expected = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    expected |= {f"stats.{name}": values[name].detach() for name in STATISTICS}
    assert_whole(folder, size, "statistics", expected)


@pytest.mark.gradient
def test_a_loss_of_ones_own_is_that_of_the_whole_vocabulary(solved):
    size, folder = solved
    given = cast(problem("forward_kl"), torch.float64)
    leaves = {name: given[name].requires_grad_() for name in LEARNED}
    loss = fused_token_loss(**own_arguments(given), backend="reference").loss
    loss.backward()
    expected = {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    assert_whole(folder, size, "own", expected | {"loss": loss.detach()})
