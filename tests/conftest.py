"""Proof that the gradient tests can fail: each is run again on gradients that are wrong.

A test marked `gradient` first runs as it is. Then, for each gradient that the fused op formed in it
and for each mutation below, its body runs again, with the same fixtures, on an op whose solution
carries the mutated gradient, and has to fail with an AssertionError. A gradient that the test asks
for and does not check is therefore an error: freeze it.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

# Before anything imports triton, which then makes interpreted kernels of its own library too.
os.environ.setdefault("TRITON_INTERPRET", "1")

GRADIENTS = ("student_grad", "weight_grad", "bias_grad")
NAMES = dict(zip(("student_hidden", "weight", "bias"), GRADIENTS, strict=True))  # by input
MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "zeroed": lambda gradient: gradient * 0,
    "x 1.05": lambda gradient: gradient * 1.05,
    "shifted by one row": lambda gradient: gradient.roll(1, 0),
}


@dataclass
class Tally:
    caught: int = 0
    missed: list[str] = field(default_factory=list)


TALLY = pytest.StashKey[Tally]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gradient: checks gradients; has to fail on each mutation of tests/conftest.py"
    )
    config.stash[TALLY] = Tally()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    if pyfuncitem.get_closest_marker("gradient") is None:
        return (yield)
    import torch  # here, so that other tests do not pay for it

    formed: set[str] = set()

    def record(solution: Any) -> None:
        formed.update(name for name in GRADIENTS if getattr(solution, name) is not None)

    state = torch.get_rng_state()
    with _altered_solutions(record):
        result = yield
    caught, missed = 0, []
    for name in (name for name in GRADIENTS if name in formed):
        for mutation in MUTATIONS:
            torch.set_rng_state(state)
            if _notices(pyfuncitem, name, mutation):
                caught += 1
            else:
                missed.append(f"{name} {mutation}")
    tally = pyfuncitem.config.stash[TALLY]
    tally.caught += caught
    tally.missed += missed
    if missed:
        pytest.fail(f"passes on a wrong gradient: {', '.join(missed)}", pytrace=False)
    return result


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tally = config.stash[TALLY]
    total = tally.caught + len(tally.missed)
    if total:
        terminalreporter.write_line(f"gradient mutations caught: {tally.caught} / {total}")


def _notices(pyfuncitem: pytest.Function, name: str, mutation: str) -> bool:
    def mutate(solution: Any) -> None:
        gradient = getattr(solution, name)
        if gradient is not None:
            setattr(solution, name, MUTATIONS[mutation](gradient))

    fixtures = {
        argument: pyfuncitem.funcargs[argument]
        for argument in inspect.signature(pyfuncitem.obj).parameters
    }
    with _altered_solutions(mutate):
        try:
            pyfuncitem.obj(**fixtures)
        except AssertionError:
            return True
    return False


@contextmanager
def _altered_solutions(alter: Callable[[Any], None]) -> Iterator[None]:
    """Shows `alter` the gradients of each solution of the fused op before autograd gets them.

    And those of `hsd_kernels.parity`, which are autograd's own, on their way to the leaves; and
    those that a test says it received from another process, by `kernel_problems.received`.
    """
    from hsd_kernels import ops, parity

    def received(gradients: dict[str, Any]) -> dict[str, Any]:
        solution = SimpleNamespace(**{name: gradients.get(of) for of, name in NAMES.items()})
        alter(solution)
        return {of: getattr(solution, name) for of, name in NAMES.items() if of in gradients}

    solve, check = ops.solve, parity.check

    def altered(*arguments: Any) -> Any:
        solution = solve(*arguments)
        alter(solution)
        return solution

    def watched(*arguments: Any) -> Any:
        problem = check(*arguments)
        student, weight, bias = _passing(alter)(problem.student, problem.weight, problem.bias)
        return replace(problem, student=student, weight=weight, bias=bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "solve", altered)
        patch.setattr(parity, "check", watched)
        if "kernel_problems" in sys.modules:
            patch.setattr(sys.modules["kernel_problems"], "received", received)
        yield


def _passing(alter: Callable[[Any], None]) -> Callable[..., Any]:
    """The identity of (student, weight, bias), whose gradients `alter` sees as a solution's."""
    import torch

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *learned: Any) -> Any:
            return tuple(None if value is None else value.view_as(value) for value in learned)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            wanted = zip(GRADIENTS, gradients, ctx.needs_input_grad, strict=True)
            solution = SimpleNamespace(**{name: g if need else None for name, g, need in wanted})
            alter(solution)
            return tuple(getattr(solution, name) for name in GRADIENTS)

    return Passing.apply
