"""Losses as functions of per-token statistics: plain arithmetic on (C,) vectors, no vocabulary.

A token loss takes the statistics of `hsd_kernels.statistics.named_statistics` and the per-token
inputs of its call, and returns one value per token; the pipeline multiplies it by the token's
weight and sums. It must be elementwise over tokens: chunks of rows are passed to it one at a time.
All backends and the dense reference call the same function, and torch.func differentiates it by
the statistics.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import torch
from torch import Tensor

from hsd_kernels.statistics import STATISTICS

TokenLoss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class HsdLoss:
    """The scalars of the HSD objective (arXiv 2606.15576, equations 10 and 13) and its companions.

    Attributes:
        divergence: the statistic that pulls the student to the teacher; None without a teacher.
        divergence_scale: 1, or 1/(b(1-b)) for the "scaled" jsd convention.
        kl_coef, ref_coef, pg_coef, entropy_coef: factors of the four terms.
        token_kl_cap: nats; a token's KL above it is scaled down to it, direction kept.
        clip_range: (low, high) of the importance ratio.
    """

    divergence: Divergence | None
    divergence_scale: float = 1.0
    kl_coef: float = 1.0
    ref_coef: float = 0.0
    pg_coef: float = 1.0
    entropy_coef: float = 0.0
    token_kl_cap: float | None = None
    clip_range: tuple[float, float] = (0.2, 0.2)

    def __call__(self, statistics: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(C,) kl_coef w_kl KL + ref_coef w_ref R + pg_coef w_pg pg - entropy_coef H."""
        total = torch.zeros_like(statistics["lse"])
        if self.divergence is not None and self.kl_coef != 0:
            weights = inputs.get("kl_weights")
            kl = self.divergence_scale * _computed(statistics[self.divergence], weights)
            if self.token_kl_cap is not None:
                kl = kl * (self.token_kl_cap / kl.detach().clamp(min=self.token_kl_cap))
            total = total + self.kl_coef * _weighted(weights, kl)
        if self.ref_coef != 0:
            weights = inputs.get("ref_weights")
            ref_kl = _computed(statistics["ref_kl"], weights)
            total = total + self.ref_coef * _weighted(weights, ref_kl)
        if "advantages" in inputs and self.pg_coef != 0:
            surrogate = clipped_policy_gradient(
                statistics["logprob"],
                inputs.get("old_logprobs"),
                inputs["advantages"],
                clip_range=self.clip_range,
            )
            total = total + self.pg_coef * _weighted(inputs.get("pg_weights"), surrogate)
        if self.entropy_coef != 0:
            total = total - self.entropy_coef * statistics["entropy"]
        return total

    def scalars(self) -> list[float]:
        """Its numbers, for `hsd_loss_from`: a custom op takes lists of numbers, not objects."""
        cap = 0.0 if self.token_kl_cap is None else self.token_kl_cap
        coefficients = [self.kl_coef, self.ref_coef, self.pg_coef, self.entropy_coef]
        return [self.divergence_scale, *coefficients, cap, *self.clip_range]


def hsd_loss_from(divergence: str, scalars: Sequence[float]) -> HsdLoss:
    """The inverse of `HsdLoss.scalars`; `divergence` is "" where there is no teacher."""
    scale, kl_coef, ref_coef, pg_coef, entropy_coef, cap, low, high = scalars
    return HsdLoss(
        divergence=cast(Divergence, divergence) if divergence else None,
        divergence_scale=scale,
        kl_coef=kl_coef,
        ref_coef=ref_coef,
        pg_coef=pg_coef,
        entropy_coef=entropy_coef,
        token_kl_cap=cap or None,
        clip_range=(low, high),
    )


def _computed(statistic: Tensor, weights: Tensor | None) -> Tensor:
    """Zero for the NaN of rows that were not computed, because their weight is zero.

    Before any arithmetic: the derivative of what follows would be 0 * NaN.
    """
    if weights is None:
        return statistic
    return torch.where(weights == 0, torch.zeros_like(statistic), statistic)


def _weighted(weights: Tensor | None, value: Tensor) -> Tensor:
    return value if weights is None else weights * value


def clipped_policy_gradient(
    logprob: Tensor,
    old_logprob: Tensor | None,
    advantages: Tensor,
    *,
    clip_range: tuple[float, float],
) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) with rho = exp(logprob - old_logprob).

    Without `old_logprob` the policy's own detached log-prob stands in: rho is 1 and the gradient
    is that of -A logprob. (PPO, arXiv 1707.06347, equation 7; asymmetric clip of DAPO.)
    """
    old = logprob.detach() if old_logprob is None else old_logprob
    ratio = torch.exp(logprob - old)
    low, high = clip_range
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@dataclass(frozen=True, kw_only=True)
class LinearLoss:
    """sum of input `upstream_<name>` times statistic <name>: the backward of `vocab_statistics`."""

    names: tuple[str, ...]

    def __call__(self, statistics: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """(C,) the derivative by each statistic is its upstream gradient."""
        total = torch.zeros_like(statistics["lse"])
        for name in self.names:
            if f"upstream_{name}" in inputs:  # none in forward
                total = total + inputs[f"upstream_{name}"] * statistics[name]
        return total


# Losses of one's own, by name. A function that was passed as it is lives as long as its owner
# keeps it: a registry that held it would grow with every lambda.
HSD_LOSS = "hsd"
LINEAR_LOSS = "linear"
_REGISTERED: Final[dict[str, TokenLoss]] = {}
_PASSED: Final[weakref.WeakValueDictionary[str, TokenLoss]] = weakref.WeakValueDictionary()


def register_token_loss(name: str) -> Callable[[TokenLoss], TokenLoss]:
    """Decorator that makes a token loss available to `fused_token_loss` under `name`.

    Raises:
        ValueError: the name is taken, by another function or by the library.
        TypeError: name or loss is none.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: found {name!r}, expected a name")
    if name in (HSD_LOSS, LINEAR_LOSS):
        raise ValueError(f"name: found {name!r}, which is the library's, expected a new name")

    def register(loss: TokenLoss) -> TokenLoss:
        if not callable(loss):
            raise TypeError(f"loss: found {type(loss).__name__}, expected a function")
        if _REGISTERED.get(name, loss) is not loss:
            raise ValueError(f"name: found {name!r}, which is registered, expected a new name")
        _REGISTERED[name] = loss
        return loss

    return register


def token_loss_key(loss: object) -> str:
    """The name under which `find_token_loss` gives the loss back.

    Raises:
        ValueError, TypeError: not a registered name, or not a function.
    """
    if isinstance(loss, str):
        if loss not in _REGISTERED:
            known = ", ".join(sorted(_REGISTERED)) or "none"
            raise ValueError(f"token_loss: found {loss!r}, expected a registered name ({known})")
        return loss
    if not callable(loss):
        raise TypeError(f"token_loss: found {type(loss).__name__}, expected a function or a name")
    _check_arity(loss)
    key = f"{getattr(loss, '__qualname__', 'loss')}@{id(loss)}"
    _PASSED[key] = loss
    return key


def _check_arity(loss: Callable[..., object]) -> None:
    try:
        parameters = inspect.signature(loss)
    except ValueError:  # of something that Python knows no signature of
        return
    try:
        parameters.bind(None, None)
    except TypeError:
        raise TypeError(
            f"token_loss: found a function of {parameters}, expected one of two arguments, "
            "(statistics, inputs)"
        ) from None


def find_token_loss(key: str) -> TokenLoss:
    """The loss behind a key of `token_loss_key`."""
    return _REGISTERED[key] if key in _REGISTERED else _PASSED[key]


_TOKENS: Final = 2  # one would let a sum over tokens pass for a token's own value


class _Recorder(Mapping[str, Tensor]):
    """Statistics of made-up tokens that remember which of them were read."""

    def __init__(self, names: Sequence[str], dtype: torch.dtype) -> None:
        self._names, self._value = names, torch.full((_TOKENS,), 0.5, dtype=dtype)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        self.read.add(name)
        return self._value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def statistics_read(
    loss: TokenLoss, available: Sequence[str], inputs: Sequence[str], dtype: torch.dtype
) -> tuple[str, ...]:
    """Names of the statistics that a loss reads, found by calling it on two made-up tokens.

    Args:
        loss: the token loss.
        available: statistics that the call's inputs allow.
        inputs: names of the per-token inputs.
        dtype: of the call's statistics.

    Raises:
        ValueError, TypeError: the loss reads something else, or does not return one number per
            token.
    """
    recorder = _Recorder(available, dtype)
    given = {name: torch.full((_TOKENS,), 0.5, dtype=dtype) for name in inputs}
    try:
        value = loss(recorder, given)
    except KeyError as error:
        raise ValueError(
            f"token_loss: found that it reads {error.args[0]!r}, expected one of the statistics "
            f"{', '.join(available)} or the inputs {', '.join(inputs) or '(none)'}"
        ) from None
    if not isinstance(value, Tensor) or value.shape != (_TOKENS,):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"token_loss: found {found} for {_TOKENS} tokens, "
            f"expected a tensor of shape ({_TOKENS},)"
        )
    if not value.is_floating_point():
        raise TypeError(f"token_loss: found {value.dtype}, expected a floating-point dtype")
    return tuple(name for name in STATISTICS if name in recorder.read)
