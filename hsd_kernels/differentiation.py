"""The token loss of a chunk and its derivative by each statistic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hsd_kernels.problem import Problem
from hsd_kernels.statistics import DIFFERENTIABLE

_AUTOGRAD_KEYS = (
    torch._C.DispatchKey.AutogradCPU,
    torch._C.DispatchKey.AutogradCUDA,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)


def token_loss(
    problem: Problem, statistics: Mapping[str, Tensor], rows: Tensor, *, differentiate: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chunk's loss (), and its derivative by each differentiable statistic, (C,) each."""
    inputs = {name: value[rows] for name, value in problem.inputs.items()}
    weights = inputs["token_weights"]
    read = {name: statistics[name] for name in problem.statistics}

    variables = {name: value for name, value in read.items() if name in DIFFERENTIABLE}
    if not differentiate:
        return (weights * problem.loss(read, inputs)).sum(), {}
    with _recording():
        leaves = {name: value.detach().requires_grad_() for name, value in variables.items()}
        loss = (weights * problem.loss({**read, **leaves}, inputs)).sum()
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = zip(leaves, found, strict=True)
    return loss.detach(), {name: each for name, each in gradients if each is not None}


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record again, which does not inside a custom op: its keys are excluded there.

    (torch.func.grad would do, but not below every dispatch mode.)
    """
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
