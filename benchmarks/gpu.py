"""The loss on a GPU: correctness first, then time and peak memory against every installed rival.

    python -m benchmarks.gpu [--tokens 8192] [--hidden 4096] [--vocab 151936] [--json FILE]

Work: Jensen-Shannon divergence at 1/2 of student and teacher under one head, forward and backward,
head trained, bf16. Rivals run in turn, round after round; the table has medians, versions and the
device. Without a GPU it says so in one line and leaves with 0; TRITON_INTERPRET=1 with a small
problem tries the whole of it on the CPU, where the times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hsd_kernels import fused_hsd_loss

TOLERANCE = 5e-3  # of bf16 gradients, relative norm; rounding them alone costs 2e-3
CHECKED_TOKENS, CHECKED_VOCAB = 48, 1001

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to compute the loss.

    Attributes:
        gradient_error: of both gradients together, relative norm, against dense fp64.
        milliseconds: median over the rounds; None where it ran out of memory.
        peak_mib: beyond what was allocated before; None without a GPU.
    """

    name: str
    version: str
    gradient_error: float
    milliseconds: float | None = None
    peak_mib: float | None = None


def ours(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return fused_hsd_loss(student, teacher, head, divergence="jsd", backend="triton").loss


def ours_sparse(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    return fused_hsd_loss(
        student, teacher, head, divergence="jsd", backend="triton", sparse_tolerance=0.005
    ).loss


def plain(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    """As it is mostly written: logits in the inputs' dtype, softmaxes in fp32."""
    log_p = (student @ head.T).float().log_softmax(-1)
    log_q = (teacher @ head.detach().T).float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    p_part = log_p.exp() * (log_p - log_m)
    return 0.5 * (p_part + log_q.exp() * (log_q - log_m)).sum(-1).mean()


def liger(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    found: Tensor = loss(student, head, teacher, head.detach(), labels)
    return found


def rivals() -> dict[str, tuple[str, Loss]]:
    """Name -> (version, loss) of what is installed here."""
    found: dict[str, tuple[str, Loss]] = {
        "hsd_kernels": (version("hsd-kernels"), ours),
        "hsd_kernels, sparse_tolerance .005": (version("hsd-kernels"), ours_sparse),
        "torch": (torch.__version__, plain),
        "torch.compile": (torch.__version__, torch.compile(plain)),
    }
    if importlib.util.find_spec("liger_kernel"):
        found["liger-kernel, chunked JSD"] = (version("liger-kernel"), liger)
    return found


def problem(tokens: int, hidden: int, vocab: int, device: torch.device) -> list[Tensor]:
    """Student, teacher near it, head: entropy of about a nat, as language models have."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student, head = normal(tokens, hidden), normal(vocab, hidden)
    student = student * 12 / hidden**0.5
    teacher = student + 0.05 * normal(tokens, hidden) * 12 / hidden**0.5
    return [t.to(device, torch.bfloat16) for t in (student, teacher, head)]


def gradients(loss: Loss, given: list[Tensor]) -> Tensor:
    student, head = (given[i].detach().requires_grad_() for i in (0, 2))
    loss(student, given[1], head).backward()
    return torch.cat([student.grad.flatten(), head.grad.flatten()]).double()


def dense(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    wide = [t.double() for t in (student, teacher, head)]
    return fused_hsd_loss(*wide, divergence="jsd", backend="reference").loss


def errors(
    losses: dict[str, tuple[str, Loss]], hidden: int, device: torch.device
) -> list[Measured]:
    given = problem(CHECKED_TOKENS, hidden, CHECKED_VOCAB, device)
    exact = gradients(dense, given)
    return [
        Measured(
            name=name,
            version=found,
            gradient_error=float((gradients(loss, given) - exact).norm() / exact.norm()),
        )
        for name, (found, loss) in losses.items()
    ]


def timed(loss: Loss, given: list[Tensor]) -> tuple[float, float | None]:
    """Milliseconds, and MiB at the peak."""
    device = given[0].device
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    student, head = (given[i].detach().requires_grad_() for i in (0, 2))
    loss(student, given[1], head).backward()
    if on_gpu:
        torch.cuda.synchronize()
    spent = 1e3 * (time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None
    return spent, peak


def measure(
    checked: list[Measured],
    losses: dict[str, tuple[str, Loss]],
    given: list[Tensor],
    *,
    rounds: int,
) -> list[Measured]:
    """Time and memory, the rivals in turn in each round; the first round warms up."""
    times: dict[str, list[float]] = {each.name: [] for each in checked}
    peaks: dict[str, float | None] = {}
    for round_ in range(rounds + 1):
        for name in list(times):
            try:
                spent, peaks[name] = timed(losses[name][1], given)
            except torch.OutOfMemoryError:
                del times[name]
                continue
            if round_:
                times[name].append(spent)
    return [
        Measured(
            **{
                **asdict(each),
                "milliseconds": statistics.median(times[each.name]) if each.name in times else None,
                "peak_mib": peaks.get(each.name),
            }
        )
        for each in checked
    ]


def table(rows: list[Measured], title: str) -> Table:
    found = Table(title=title, title_justify="left")
    for column in ("", "version", "gradient error", "median, ms", "peak, MiB"):
        found.add_column(column, justify="left" if column in ("", "version") else "right")
    for row in rows:
        spent = "out of memory" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
        found.add_row(row.name, row.version, f"{row.gradient_error:.1e}", spent, peak)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("tokens", 8192), ("hidden", 4096), ("vocab", 151_936), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        print("no CUDA or ROCm device here: nothing to measure")
        return 0
    device = torch.device("cpu" if interpreted else "cuda")
    name = "Triton's interpreter" if interpreted else torch.cuda.get_device_name()
    losses, console = rivals(), Console()
    checked = errors(losses, min(a.hidden, 256), device)
    wrong = [row for row in checked if row.name == "hsd_kernels" and row.gradient_error > TOLERANCE]
    if wrong:
        console.print(f"[red]wrong gradient: {wrong[0]}, expected an error of {TOLERANCE} at most")
        return 1
    given = problem(a.tokens, a.hidden, a.vocab, device)
    rows = measure(checked, losses, given, rounds=a.rounds)
    title = f"{name}: {a.tokens:,} tokens, hidden {a.hidden:,}, vocabulary {a.vocab:,}, bf16"
    console.print(table(rows, title))
    if a.json:
        a.json.write_text(json.dumps({"work": title, "rows": [asdict(r) for r in rows]}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
