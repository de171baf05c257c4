"""What fused_hsd_loss allocates, read from the profiler, which sees inside custom ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
from kernel_problems import Draw, cast
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hsd_kernels import fused_hsd_loss, ops
from hsd_kernels.rows.compiled import compiler_found

MIB = 2**20


@dataclass
class Allocations:
    """Bytes of each allocation, negative where it was freed, in order."""

    sizes: list[int] = field(default_factory=list)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def peak(self) -> int:
        return max(accumulate(self.sizes))


@contextmanager
def recorded() -> Iterator[Allocations]:
    allocations = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield allocations
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    allocations.sizes = [event.nbytes() for event in memory]


def small_problem() -> dict[str, Tensor]:
    """N x V elements are many times the head, the hidden states, and a chunk."""
    draw = Draw((512,), 4, 1000)
    return cast(draw.problem(), torch.float32) | {"token_weights": draw.masked().float()}


def forward_and_backward(arguments: dict[str, Tensor], **options: object) -> Allocations:
    leaves = {
        name: arguments[name].requires_grad_()
        for name in ("student_hidden", "weight", "bias")
        if name in arguments
    }
    with recorded() as allocations:
        out = fused_hsd_loss(**arguments | leaves, **options)
        out.loss.backward()
    assert out.plan.chunks >= 4
    return allocations


CHUNK_BYTES = 2 * 1000 * 4 * 40
TERMS = {
    "forward_kl": {},
    "jsd": {"divergence": "jsd"},
    "two temperatures": {"kl_temperature": 1.5},
    "entropy": {"entropy_coef": 0.1},
}


@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS)
def test_nothing_of_n_x_v_elements_is_allocated(options):
    allocations = forward_and_backward(small_problem(), max_chunk_bytes=CHUNK_BYTES, **options)
    assert 0 < allocations.largest <= CHUNK_BYTES


def test_a_deliberate_n_x_v_buffer_is_seen(monkeypatch):
    solve = ops.solve

    def wasteful(problem, wanted):
        torch.empty(len(problem.student), len(problem.weight))
        return solve(problem, wanted)

    monkeypatch.setattr(ops, "solve", wasteful)
    allocations = forward_and_backward(small_problem(), max_chunk_bytes=CHUNK_BYTES)
    assert allocations.largest >= 512 * 1000 * 4


@pytest.mark.parametrize("retain", [False, True])
def test_the_gradients_that_forward_formed_become_those_of_the_leaves(retain):
    draw = Draw((64,), 32, 4000)
    given = cast(draw.problem(), torch.float32)
    given["weight"] = given["weight"].requires_grad_()
    loss = fused_hsd_loss(**given).loss
    with recorded() as allocations:
        (3 * loss).backward(retain_graph=retain)
    head = given["weight"].nbytes
    # A graph that is kept needs the formed gradient again: for the leaf there is a copy.
    assert allocations.largest >= head if retain else allocations.largest < head / 100


def naive_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    log_p = torch.log_softmax(student @ weight.T, -1)
    log_q = torch.log_softmax(teacher @ weight.detach().T, -1)
    return torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_found(), reason="torch.compile finds no C++ compiler")
def test_peak_is_at_most_a_fifth_of_the_naive_loss(capsys):
    rows, hidden, vocab = 4096, 64, 49_152
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> Tensor:
        return torch.randn(count, hidden, generator=generator)

    student, teacher, weight = states(rows), states(rows), states(vocab) / 8
    student.requires_grad_()
    weight.requires_grad_()

    def allocated(loss: Callable[[], Tensor]) -> Allocations:
        with recorded() as allocations:
            loss().backward()
        student.grad = weight.grad = None
        return allocations

    def fused() -> Tensor:
        nonlocal plan
        out = fused_hsd_loss(student, teacher, weight)
        plan = out.plan
        return out.loss

    plan = None
    allocations = allocated(fused)
    ours = allocations.peak
    naive = allocated(lambda: naive_loss(student, teacher, weight)).peak
    with capsys.disabled():
        print(
            f"\npeak memory at N={rows:,} V={vocab:,}: {ours / MIB:,.0f} MiB, "
            f"naive {naive / MIB:,.0f} MiB, {naive / ours:.1f} times as much; "
            f"planned {plan.workspace_bytes / MIB:,.0f} MiB in {plan.chunks} chunks"
        )
    assert plan.fused
    assert allocations.largest <= 2 * plan.rows_per_chunk * vocab * 4
    assert ours <= naive / 5
    assert plan.workspace_bytes <= ours <= 1.25 * plan.workspace_bytes
