"""Small problems for the fused loss, and the one way in which results are compared."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hsd_kernels import LossOutput, Plan, TokenStatistics, fused_hsd_loss

LEARNED = ("student_hidden", "weight", "bias")
PER_TOKEN = (
    "token_weights",
    "kl_weights",
    "pg_weights",
    "ref_weights",
    "advantages",
    "old_logprobs",
    "temperature",
    "kl_temperature",
    "teacher_temperature",
)
ONLY_FORMED_IN_CHUNKS = (
    "gradient_mass",
    "dropped_mass",
    "kept_columns",
)  # the dense reference has none

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Result:
    loss: Tensor
    stats: TokenStatistics
    plan: Plan
    gradients: dict[str, Tensor]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; inf where either is not finite."""
    error = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / size if size else (math.inf if error else 0.0)


class Draw:
    """Random tensors for one problem: leading shape, hidden size, vocabulary size."""

    def __init__(
        self, lead: Sequence[int] = (12,), hidden: int = 8, vocab: int = 37, *, seed: int = 0
    ) -> None:
        self.lead, self.hidden, self.vocab = tuple(lead), hidden, vocab
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def states(self, hidden: int | None = None) -> Tensor:
        return self.normal(*self.lead, hidden or self.hidden)

    def head(self, hidden: int | None = None, vocab: int | None = None) -> Tensor:
        return 0.5 * self.normal(vocab or self.vocab, hidden or self.hidden)

    def per_token(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        uniform = torch.rand(self.lead, generator=self._generator, dtype=torch.float64)
        return low + (high - low) * uniform

    def masked(self, *, keep: float = 0.6) -> Tensor:
        """Positive per-token weights, some of them zero: the first is not, the last is."""
        weights = self.per_token(0.2, 1.0) * (self.per_token() < keep)
        weights.view(-1)[0], weights.view(-1)[-1] = 0.5, 0.0
        return weights

    def targets(self) -> Tensor:
        return torch.randint(self.vocab, self.lead, generator=self._generator)

    def problem(self, *, near: float = 0.3, bias: bool = True) -> Arguments:
        """Student and teacher states `near` each other, a head, sampled tokens."""
        student = self.states()
        problem: Arguments = {
            "student_hidden": student,
            "teacher_hidden": student + near * self.states(),
            "weight": self.head(),
            "targets": self.targets(),
        }
        return problem | ({"bias": 0.3 * self.normal(self.vocab)} if bias else {})


def cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> Arguments:
    """Every floating-point tensor in `dtype`; per-token vectors in at least fp32."""

    def convert(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        narrow = dtype in (torch.bfloat16, torch.float16)
        return value.to(torch.float32 if narrow and name in PER_TOKEN else dtype)

    return {name: convert(name, value) for name, value in arguments.items()}


def solve(
    arguments: Mapping[str, Any],
    *,
    backend: str = "cpu",
    upstream: float = 1.0,
    frozen: Sequence[str] = (),
    loss: Callable[..., LossOutput] = fused_hsd_loss,
) -> Result:
    """One call and its backward; fresh leaves, so that a problem can be solved many times."""
    leaves = {
        name: arguments[name].detach().requires_grad_(name not in frozen)
        for name in LEARNED
        if arguments.get(name) is not None
    }
    out = loss(**{**arguments, **leaves}, backend=backend)
    (upstream * out.loss).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Result(out.loss.detach(), out.stats, out.plan, gradients)


def received(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by input that another process formed; where mutations alter them."""
    return gradients


def truth(arguments: Mapping[str, Any], **options: Any) -> Result:
    """The dense reference in fp64 on the same values."""
    return solve(cast(arguments, torch.float64), backend="reference", **options)


def assert_matches(result: Result, expected: Result, *, tolerance: float = 1e-4) -> None:
    """Gradients to `tolerance` by relative norm; then the loss, and every statistic."""
    assert result.gradients.keys() == expected.gradients.keys()
    errors = {
        name: relative_error(gradient, expected.gradients[name])
        for name, gradient in result.gradients.items()
    }
    assert max(errors.values(), default=0.0) <= tolerance, errors
    torch.testing.assert_close(
        result.loss.double(), expected.loss.double(), rtol=tolerance, atol=tolerance / 10
    )
    assert_same_statistics(result.stats, expected.stats, tolerance=tolerance)


def assert_same_statistics(
    actual: TokenStatistics, expected: TokenStatistics, *, tolerance: float
) -> None:
    for field in fields(TokenStatistics):
        if field.name in ONLY_FORMED_IN_CHUNKS:
            continue
        found, wanted = getattr(actual, field.name), getattr(expected, field.name)
        if wanted is None:
            assert found is None, field.name
            continue
        torch.testing.assert_close(
            found.double(),
            wanted.double(),
            rtol=tolerance,
            atol=tolerance / 10,
            equal_nan=True,
            msg=lambda text, name=field.name: f"{name}: {text}",
        )


def likely_token(like: Tensor) -> Tensor:
    """One at the first token, zero elsewhere."""
    return torch.zeros_like(like).index_fill(-1, torch.tensor(0), 1.0)


def scale_and_height(nats: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, 1) each: the entropy of scale * noise + height * likely_token is `nats`.

    A low entropy comes from one likely token above the noise, as in language models.
    """
    zero = torch.zeros_like(noise[:, :1])

    def negative_entropy(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1, keepdim=True)

    if nats >= 1:
        return _bisect(lambda scale: negative_entropy(scale * noise), -nats, zero), zero
    likely, scale = likely_token(noise), 2.0
    return scale + zero, _bisect(
        lambda height: negative_entropy(scale * noise + height * likely), -nats, zero
    )


def step(nats: float, logits: Tensor, direction: Tensor) -> Tensor:
    """(rows, 1): KL(softmax(logits) || softmax(logits + step * direction)) is `nats`."""
    log_p = logits.log_softmax(-1)

    def divergence(step: Tensor) -> Tensor:
        log_q = (logits + step * direction).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)

    return _bisect(divergence, nats, torch.zeros_like(logits[:, :1]))


def _bisect(rising: Callable[[Tensor], Tensor], target: float, zero: Tensor) -> Tensor:
    """Positive arguments at which `rising` reaches `target`, searched by factors."""
    low, high = zero - 12, zero + 12
    for _ in range(24):
        middle = (low + high) / 2
        below = rising(middle.exp()) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).exp()


@functools.cache
def regime(kl: float, entropy: float, offsets: tuple[float, float] = (0, 0)) -> Arguments:
    """A shared head under which the student has `entropy`, and KL(student || teacher) is `kl`.

    Two coordinates of the hidden states serve one purpose each: the first raises the likely token,
    the second raises all logits, by `offsets` of student and teacher.
    """
    noisy = 6
    rows, vocab = (4, 512) if entropy <= 6 else (2, 65_536)
    draw = Draw((rows,), noisy + 2, vocab)
    weight = draw.normal(draw.vocab, draw.hidden) / noisy**0.5
    weight[:, 1] = 1
    weight[:, 0] = likely_token(weight[:, 0])
    student, direction = draw.normal(rows, draw.hidden), draw.normal(rows, draw.hidden)
    student[:, :2] = direction[:, :2] = 0
    scale, height = scale_and_height(entropy, student @ weight.T)
    student = scale * student
    student[:, :1] = height
    teacher = student + step(kl, student @ weight.T, direction @ weight.T) * direction
    student[:, 1], teacher[:, 1] = offsets
    return {"student_hidden": student, "teacher_hidden": teacher, "weight": weight}
