"""A call of which only shapes are known, as memory trackers see it, against one that runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_problems import Draw, cast
from test_memory import recorded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from hsd_kernels import fused_hsd_loss, ops
from hsd_kernels.rows import torch_logits

LEARNED = ("student_hidden", "weight")
ROWS, HIDDEN, VOCAB = 512, 32, 8000
CHUNK_BYTES = 128 * 3 * 4 * VOCAB


class Tracker(MemTracker):
    """Without a rule of its own: rules are by class, and stay."""


@pytest.fixture(scope="module", autouse=True)
def shown():
    ops.show_workspace(MemTracker)


def problem(dtype: torch.dtype = torch.float32, **options: object) -> dict[str, object]:
    given = cast(Draw((ROWS,), HIDDEN, VOCAB).problem(bias=False), dtype)
    return {**given, "max_chunk_bytes": CHUNK_BYTES, **options}


def step(given: dict[str, object]) -> None:
    leaves = {name: given[name].detach().requires_grad_() for name in LEARNED}
    fused_hsd_loss(**given | leaves).loss.backward()


def statistics(given: dict[str, object]) -> None:
    with torch.no_grad():
        fused_hsd_loss(**given)


def simulated_peak(
    given: dict[str, object],
    tracker: MemTracker,
    call: Callable[[dict[str, object]], None] = step,
) -> int:
    """Bytes beyond the inputs."""
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        tensors = [value for value in fake.values() if isinstance(value, torch.Tensor)]
        tracker.track_external(*tensors)
        with tracker:
            call(fake)
    (peak,) = (total["Total"] for total in tracker.get_tracker_snapshot("peak").values())
    return peak - sum(value.untyped_storage().nbytes() for value in tensors)


def measured_peak(
    given: dict[str, object], call: Callable[[dict[str, object]], None] = step
) -> int:
    with recorded() as allocations:
        call(given)
    return allocations.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"kl_temperature": 1.5}], ids=["", "two temperatures"])
def test_the_simulated_peak_is_the_measured_one(dtype, options, monkeypatch):
    # What plain PyTorch needs beside the workspace to work on some rows; compiled, it needs none.
    monkeypatch.setattr(torch_logits, "PLAIN_BLOCK_ELEMENTS", VOCAB)
    given = problem(dtype, **options)
    step(given)  # what is allocated once per process
    # bf16 logits also have probes, of a number of columns that is small beside a real vocabulary.
    tolerance = 0.15 if dtype == torch.bfloat16 else 0.1
    assert simulated_peak(given, MemTracker()) == pytest.approx(measured_peak(given), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_simulated_peak_of_statistics_alone(dtype, monkeypatch):
    monkeypatch.setattr(torch_logits, "PLAIN_BLOCK_ELEMENTS", VOCAB)
    given = problem(dtype)
    statistics(given)
    peaks = simulated_peak(given, MemTracker(), statistics), measured_peak(given, statistics)
    assert max(peaks) <= CHUNK_BYTES  # two sides of logits, where a gradient leaves room for three
    assert peaks[0] == pytest.approx(peaks[1], rel=0.2)


def test_a_tracker_that_was_not_shown_the_workspace_misses_it():
    given = problem()
    hidden = simulated_peak(given, MemTracker()) - simulated_peak(given, Tracker())
    assert hidden >= 0.5 * CHUNK_BYTES


def test_gpu_buffers_can_be_simulated_without_a_gpu():
    """bf16: fp32 logits of two sides and a bf16 gradient, rows of a padded pitch."""
    given = problem(torch.bfloat16, backend="triton", max_chunk_bytes=(2 * 4 + 2) * VOCAB * 64)
    peak = simulated_peak(given, MemTracker())
    buffers = (2 * 4 + 2) * 64 * VOCAB
    gradients = 4 * HIDDEN * (VOCAB + ROWS)
    assert buffers + gradients <= peak <= 1.1 * (buffers + gradients)
