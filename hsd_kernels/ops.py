"""The custom ops: what torch.compile, autograd and simulators see of a loss.

`hsd_kernels::solve` forms the gradients during forward; its backward scales them by the upstream
gradient. `hsd_kernels::statistics` forms none; its backward is a `solve` whose loss is linear in
the statistics. Both take a `Problem` apart, because an op takes tensors, numbers and strings.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

from hsd_kernels.checks import check_values, poison
from hsd_kernels.op_arguments import arguments_of, problem_of
from hsd_kernels.parallel import shard_of
from hsd_kernels.pipeline import solve
from hsd_kernels.plan import Plan, record
from hsd_kernels.problem import Problem
from hsd_kernels.scaling import product, scaled
from hsd_kernels.statistics import DIFFERENTIABLE, STATISTICS
from hsd_kernels.workspace import Wanted, simulate

OUTPUTS = (
    "loss",
    "statistics",
    "mass",
    "top_ids",
    "top_logprobs",
    "student_grad",
    "weight_grad",
    "bias_grad",
    "plan",
)
"""Of `hsd_kernels::solve`; what a call has not is an empty tensor."""

_PLAN_FIELDS = len(Plan.__dataclass_fields__)


def _checked(problem: Problem) -> Problem:
    """Checks the values where that costs nothing or was asked for; else lets faults show as NaN."""
    settings = problem.settings
    device = problem.student.device
    vocab_size = settings.vocab_size
    if settings.group:
        vocab_size = shard_of(settings.group, len(problem.weight), vocab_size, device).vocab_size
    if device.type == "cpu" or settings.validate:
        check_values(problem, vocab_size)
        return problem
    return poison(problem, vocab_size)


def _solve(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    reference: Tensor | None,
    reference_weight: Tensor | None,
    reference_bias: Tensor | None,
    targets: Tensor | None,
    input_names: str,
    input_values: Sequence[Tensor],
    temperature: Tensor,
    kl_temperature: Tensor,
    teacher_temperature: Tensor,
    weight_grad_out: Tensor | None,
    loss: str,
    loss_scalars: Sequence[float],
    divergence: str,
    statistics: str,
    jsd_beta: float,
    one_temperature: bool,
    teacher_shares_temperature: bool,
    logit_scale: float,
    logit_softcap: float | None,
    vocab_size: int,
    precision: str,
    sparse_tolerance: float | None,
    sparse_max_columns: int | None,
    top_k: int,
    max_chunk_bytes: int | None,
    group: str,
    validate: bool,
    backend: str,
    want_student: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`OUTPUTS` of a problem."""
    arguments = locals()
    # An outer autocast would round the logits.
    with torch.autocast(student.device.type, enabled=False):
        solution = solve(
            _checked(problem_of(arguments)), Wanted(want_student, want_weight, want_bias)
        )

    def given(gradient: Tensor | None) -> Tensor:
        return temperature.new_empty(0) if gradient is None else gradient

    return (
        solution.loss,
        solution.statistics,
        solution.mass,
        solution.top.ids,
        solution.top.logprobs,
        given(solution.student_grad),
        given(solution.weight_grad),
        given(solution.bias_grad),
        record(solution.plan),
    )


# An op that writes an argument has no autograd formula of its own: see `_SolveInto`.
solve_op = torch.library.custom_op("hsd_kernels::solve", _solve, mutates_args=())
solve_into_op = torch.library.custom_op(
    "hsd_kernels::solve_into", _solve, mutates_args={"weight_grad_out"}
)
_PARAMETERS = tuple(inspect.signature(_solve).parameters)


def _fake(student: Tensor, weight: Tensor, *_arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    a = dict(zip(_PARAMETERS, (student, weight, *_arguments), strict=False)) | named
    count, dtype = student.shape[0], a["temperature"].dtype
    own_gradient = a["want_weight"] and a["weight_grad_out"] is None
    # Held until the outputs are there, as in the op itself: a memory tracker sees both.
    wanted = Wanted(a["want_student"], a["want_weight"], a["want_bias"])
    _workspace = simulate(problem_of(a), wanted)

    def new(*shape: Any) -> Tensor:
        return student.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(len(STATISTICS), count),
        new(3, count),
        student.new_empty((2, count, a["top_k"]), dtype=torch.int64),
        new(2, count, a["top_k"]),
        new(*student.shape) if a["want_student"] else new(0),
        new(*weight.shape) if own_gradient else new(0),
        new(weight.shape[0]) if a["want_bias"] else new(0),
        torch.empty(_PLAN_FIELDS, dtype=torch.float64, device="cpu"),
    )


statistics_op = torch.library.custom_op("hsd_kernels::statistics", _solve, mutates_args=())
solve_op.register_fake(_fake)
statistics_op.register_fake(_fake)
solve_into_op.register_fake(_fake)


def show_workspace(tracker: type[TorchDispatchMode]) -> None:
    """Lets a memory tracker see what the ops of a simulated call (FakeTensorMode) allocate.

    A dispatch mode sees an op's outputs, not what happens inside. With this the workspace is shown
    too, as if every row had a weight and no GPU kernel needed memory of its own.

    Args:
        tracker: the class of the mode, such as `torch.distributed._tools.mem_tracker.MemTracker`.
    """

    def inside(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if active_fake_mode() is None:
            return mode.__torch_dispatch__(func, types, args, kwargs)
        with mode:
            return _fake(*args, **(kwargs or {}))

    for op in (solve_op, solve_into_op, statistics_op):
        op.register_torch_dispatch(tracker, inside)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    a = dict(zip(_PARAMETERS, inputs, strict=True))
    ctx.inputs = len(a["input_values"])
    ctx.wanted = [name for name in ("student", "weight", "bias") if a[f"want_{name}"]]
    formed = dict(zip(OUTPUTS, output, strict=True))
    ctx.save_for_backward(
        *(formed[f"{name}_grad"] for name in ctx.wanted), *(a[name] for name in ctx.wanted)
    )


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * len(_PARAMETERS)
    gradients[_PARAMETERS.index("input_values")] = [None] * ctx.inputs
    if upstream is not None:
        saved, count = ctx.saved_tensors, len(ctx.wanted)
        formed, inputs = saved[:count], saved[count:]
        for name, gradient, of in zip(ctx.wanted, formed, inputs, strict=True):
            gradients[_PARAMETERS.index(name)] = scaled(gradient, upstream, of)
    return tuple(gradients)


solve_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _save_problem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    a = dict(zip(_PARAMETERS, inputs, strict=True))
    ctx.mark_non_differentiable(output[0], *output[2:])
    tensors = {name: value for name, value in a.items() if isinstance(value, Tensor)}
    ctx.names, ctx.inputs = tuple(tensors), len(a["input_values"])
    ctx.save_for_backward(*tensors.values(), *a["input_values"])
    ctx.others = {name: value for name, value in a.items() if not isinstance(value, Tensor)}


def _statistics_gradients(
    ctx: Any, _loss: None, upstream: Tensor | None, *_: None
) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * len(_PARAMETERS)
    gradients[_PARAMETERS.index("input_values")] = [None] * ctx.inputs
    if upstream is None:
        return tuple(gradients)
    saved = ctx.saved_tensors
    a = {**ctx.others, **dict(zip(ctx.names, saved, strict=False))}
    names = [name for name in a["statistics"].split(",") if name in DIFFERENTIABLE]
    a["input_names"] = ",".join([a["input_names"], *(f"upstream_{name}" for name in names)])
    a["input_values"] = [
        *saved[len(ctx.names) :],
        *(upstream[STATISTICS.index(name)].contiguous() for name in names),
    ]
    for name in ("student", "weight", "bias"):
        a[f"want_{name}"] = ctx.needs_input_grad[_PARAMETERS.index(name)]
    values = dict(zip(OUTPUTS, torch.ops.hsd_kernels.solve(**a), strict=True))
    for name in ("student", "weight", "bias"):
        if a[f"want_{name}"]:
            gradient = values[f"{name}_grad"].to(a["student"].dtype)
            if torch.is_grad_enabled():  # create_graph: `scale` refuses a second derivative
                gradient = scaled(gradient, gradient.new_ones(()), a[name])
            gradients[_PARAMETERS.index(name)] = gradient
    return tuple(gradients)


statistics_op.register_autograd(_statistics_gradients, setup_context=_save_problem)


class _SolveInto(torch.autograd.Function):
    """`hsd_kernels::solve_into`: the head's gradient is added to `weight_grad_out` in forward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, bias: Tensor | None, arguments: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        values = torch.ops.hsd_kernels.solve_into(**arguments, student=student, bias=bias)
        ctx.save_for_backward(*values[OUTPUTS.index("student_grad") : OUTPUTS.index("plan")])
        ctx.mark_non_differentiable(*values[1:])
        ctx.wanted = (arguments["want_student"], arguments["want_bias"])
        ctx.dtype = student.dtype
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream.device.type == "cpu" and float(upstream) != 1.0:
            raise RuntimeError(
                f"weight_grad_out: found an upstream gradient of {float(upstream)}, expected 1: "
                "the head's gradient is added during forward; put factors into token_weights"
            )
        student_grad, _, bias_grad = ctx.saved_tensors
        found = [
            product(saved, upstream, ctx.dtype) if wanted else None
            for saved, wanted in zip((student_grad, bias_grad), ctx.wanted, strict=True)
        ]
        return *found, None


def solved(problem: Problem, wanted: Wanted) -> dict[str, Tensor]:
    """`OUTPUTS` by name; the loss carries the gradient."""
    arguments = arguments_of(problem)
    arguments |= {f"want_{name}": value for name, value in wanted._asdict().items()}
    if problem.weight_grad_out is None:
        values = torch.ops.hsd_kernels.solve(**arguments)
    else:
        student, bias = arguments.pop("student"), arguments.pop("bias")
        arguments["weight"] = problem.weight.detach()
        values = _SolveInto.apply(student, bias, arguments)  # type: ignore[no-untyped-call]
    return dict(zip(OUTPUTS, values, strict=True))


def statistics_of(problem: Problem) -> Tensor:
    """(len(STATISTICS), N), differentiable; the backward computes them again."""
    wants = {"want_student": False, "want_weight": False, "want_bias": False}
    values = torch.ops.hsd_kernels.statistics(**arguments_of(problem), **wants)
    statistics: Tensor = values[OUTPUTS.index("statistics")]
    return statistics
