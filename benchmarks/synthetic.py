"""Work B: states and head of any shape with the spectrum of a language model.

    python -m benchmarks.synthetic [--tokens 512] [--hidden 1024] [--vocab 151936]

How they are made, from one seed:
- the head's rows are normal, their directions scaled by a power law (SPECTRUM), as in trained
  heads;
- a token's hidden state is a sum of a few candidates' rows with falling weights, of a direction
  that all tokens share (frequent words are likely everywhere) and of noise;
- its size is log-normal over tokens, so that some tokens are nearly certain and some are open; a
  common factor is found by bisection that gives a mean entropy of ENTROPY nats;
- the teacher moves each state toward one of its candidates and by noise, by log-normal amounts;
  their common factor is found by bisection that gives a mean KL of DIVERGENCE nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.work import Work, cache

SPECTRUM = -0.35  # singular values of the head fall as rank ** SPECTRUM
CANDIDATES = 6
ENTROPY, DIVERGENCE = 1.0, 0.03  # nats, means over tokens
CALIBRATED_ON = 64  # tokens
QWEN3_06B = (512, 1024, 151_936)


def make(tokens: int, hidden: int, vocab: int, *, seed: int = 0) -> Work:
    """A forward-KL work in fp32; see the module for its recipe."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head = normal(vocab, hidden) * torch.arange(1, hidden + 1).float() ** SPECTRUM
    head /= head.norm(dim=-1).mean()
    candidates = torch.randint(vocab, (tokens, CANDIDATES), generator=generator)
    falling = torch.arange(1, CANDIDATES + 1).float() ** -0.5 * (1 + 0.2 * normal(tokens, 1))
    base = torch.einsum("nk,nkd->nd", falling, head[candidates])
    base += 0.3 * head[torch.randint(vocab, (64,), generator=generator)].mean(0) * 8
    base += 0.2 * normal(tokens, hidden) / hidden**0.5
    base *= (0.4 * normal(tokens, 1)).exp()
    few = slice(0, CALIBRATED_ON)
    size = _bisected(lambda s: _entropy(s * base[few], head), ENTROPY, low=0.1, high=1e3)
    student = size * base
    shift = head[candidates[:, 1]] - head[candidates[:, 0]] + normal(tokens, hidden) / hidden**0.5
    shift *= size * (0.7 * normal(tokens, 1)).exp()

    def divergence(amount: float) -> float:
        return -_divergence(student[few], student[few] + amount * shift[few], head)

    amount = _bisected(divergence, -DIVERGENCE, low=1e-4, high=1.0)
    return Work(
        loss="forward_kl",
        student=student,
        teacher=student + amount * shift,
        head=head,
        targets=candidates[:, 0].clone(),
        source=f"synthetic-{tokens}-{hidden}-{vocab}-{seed}",
    )


def spectrum(work: Work, rows: int = 256) -> dict[str, float]:
    """Mean entropy and KL of the first rows, nats."""
    student, teacher = work.student[:rows].float(), work.teacher[:rows].float()
    return {
        "entropy": _entropy(student, work.head.float()),
        "forward_kl": _divergence(student, teacher, work.head.float()),
    }


def _entropy(states: Tensor, head: Tensor) -> float:
    log_p = (states @ head.T).double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def _divergence(student: Tensor, teacher: Tensor, head: Tensor) -> float:
    log_p, log_q = ((x @ head.T).double().log_softmax(-1) for x in (student, teacher))
    return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


def _bisected(
    falling: Callable[[float], float], wanted: float, *, low: float, high: float
) -> float:
    """Where a falling function is `wanted`, between two positive numbers."""
    for _ in range(24):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > wanted else (low, middle)
    return float((low * high) ** 0.5)


def path() -> Path:
    return cache() / "B.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, size in zip(("tokens", "hidden", "vocab"), QWEN3_06B, strict=True):
        parser.add_argument(f"--{name}", type=int, default=size)
    a = parser.parse_args()
    work = make(a.tokens, a.hidden, a.vocab)
    measured = spectrum(work)
    path().parent.mkdir(parents=True, exist_ok=True)
    names = ("student", "teacher", "head", "targets")
    save_file(
        {name: getattr(work, name) for name in names},
        path(),
        metadata={"configuration": json.dumps(vars(a) | {"source": work.source} | measured)},
    )
    print(f"{path()}: {measured}")


if __name__ == "__main__":
    main()
