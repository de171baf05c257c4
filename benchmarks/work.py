"""The work that every method is given: hidden states, heads, and which loss is asked for.

| work | states | loss |
|---|---|---|
| A | real: SmolLM2-135M, teacher with answer and peer (`benchmarks.activations`) | forward KL |
| B | made: Qwen3-0.6B's shape, a language model's spectrum (`benchmarks.synthetic`) | forward KL |
| C | A, and a reference with a head of its own | forward KL + REF_COEF * KL(student, reference) |
| D | A | forward KL, log-probs and entropies without gradient |
| E | A | cross-entropy of the sampled tokens, the one loss that cut-cross-entropy has |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from hsd.policy.load import cache_directory

Loss = Literal["forward_kl", "with_reference", "statistics", "cross_entropy"]
LOSSES: dict[str, Loss] = {
    "A": "forward_kl",
    "B": "forward_kl",
    "C": "with_reference",
    "D": "statistics",
    "E": "cross_entropy",
}
REF_COEF = 0.05
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One problem; every loss is a mean over the tokens, in nats.

    Attributes:
        student, teacher: (N, D).
        head: (V, D), of both.
        targets: (N,) sampled tokens.
        reference, reference_head: (N, D) and (V, D), of a loss with a reference.
        trainable: whether the head has a gradient.
        source: how the states were made.
    """

    loss: Loss
    student: Tensor
    teacher: Tensor
    head: Tensor
    targets: Tensor
    reference: Tensor | None = None
    reference_head: Tensor | None = None
    trainable: bool = True
    source: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, D, V."""
        return (*self.student.shape, len(self.head))

    @property
    def differentiated(self) -> bool:
        return self.loss != "statistics"

    @property
    def reference_side(self) -> tuple[Tensor, Tensor]:
        """States and head of the reference.

        Raises:
            ValueError: the loss has none.
        """
        if self.reference is None or self.reference_head is None:
            raise ValueError(f"work: found loss {self.loss!r}, expected one with a reference")
        return self.reference, self.reference_head

    @property
    def gemms(self) -> int:
        """Matrix products of 2 N D V FLOP that the loss cannot do without."""
        sides = {"with_reference": 3, "cross_entropy": 1}.get(self.loss, 2)
        return sides + (1 + self.trainable if self.differentiated else 0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A work in one dtype with one kind of head: what a row of the tables is about."""

    work: str
    dtype: str
    trainable: bool = True
    tokens: int = 2048

    @property
    def name(self) -> str:
        return f"{self.work}-{self.dtype}-{'trained' if self.trainable else 'frozen'}-{self.tokens}"


def load(case: Case) -> Work:
    """The work of a case.

    Raises:
        FileNotFoundError: its states were not made yet; names the command that makes them.
        ValueError: they have fewer tokens than the case.
    """
    from benchmarks import activations, synthetic

    made = synthetic if case.work == "B" else activations
    path = made.path()
    if not path.exists():
        raise FileNotFoundError(f"no states for work {case.work}: run python -m {made.__name__}")
    tensors = load_file(path)
    if len(tensors["student"]) < case.tokens:
        found = len(tensors["student"])
        raise ValueError(f"tokens: found {case.tokens}, expected at most {found} for {case.work}")
    loss = LOSSES[case.work]
    return cast(
        Work(
            loss=loss,
            student=tensors["student"][: case.tokens],
            teacher=tensors["teacher"][: case.tokens],
            head=tensors["head"],
            targets=tensors["targets"][: case.tokens],
            reference=tensors["reference"][: case.tokens] if loss == "with_reference" else None,
            reference_head=tensors["reference_head"] if loss == "with_reference" else None,
            trainable=case.trainable,
            source=path.name,
        ),
        DTYPES[case.dtype],
    )


def cast(work: Work, dtype: torch.dtype) -> Work:
    """The same work with operands of a dtype; every method gets these very bits."""

    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return replace(
        work,
        student=work.student.to(dtype),
        teacher=work.teacher.to(dtype),
        head=work.head.to(dtype),
        reference=to(work.reference),
        reference_head=to(work.reference_head),
    )


def cache() -> Path:
    """Where states and exact gradients are kept."""
    return cache_directory() / "benchmarks"
