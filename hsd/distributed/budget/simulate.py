"""One update of one rank on fake tensors: the trainer's own code on the largest batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import transformers.masking_utils
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from hsd import train, trainer
from hsd.config import Config
from hsd.distributed.budget import kinds
from hsd.distributed.budget.architecture import add_fake_adapters, empty_model
from hsd.distributed.budget.losses import chunk_loop_loss, naive_loss
from hsd.distributed.budget.tracker import Phase, StepTracker, watching_resizes
from hsd.distributed.fsdp import shard_policy
from hsd.distributed.process import World
from hsd.objective import step
from hsd.policy.adapters import Adapters
from hsd.policy.optimizer import adamw
from hsd.policy.packing import TrainingRow
from hsd.policy.precision import compute_dtype
from hsd.policy.teachers import Policy
from hsd.trainer import sharded_policy, whole_policy
from hsd_kernels import fused_hsd_loss, plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LossName = Literal["fused", "naive", "chunk_loop"]
_LOSSES: dict[LossName, Callable[..., Any]] = {
    "fused": fused_hsd_loss,
    "naive": naive_loss,
    "chunk_loop": chunk_loop_loss,
}
MICRO_BATCHES = 2
"""Of a simulated update: the first, and the last, which finds gradients and may sum them."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated.

    Attributes:
        config: of the run.
        architecture: of its model.
        world_size: ranks, one GPU each.
        prompt_tokens: of a question.
        context_tokens: what the teacher's prompt has beyond the student's.
        response_tokens: of every rollout; the largest batch.
        engine_gpus: GPUs that share the weights of one engine, by tensor parallelism.
        loss: "fused" is the trainer's own.
        backend: of hsd_kernels, "triton" for a GPU.
    """

    config: Config
    architecture: PreTrainedConfig
    world_size: int
    prompt_tokens: int
    context_tokens: int
    response_tokens: int
    engine_gpus: int = 1
    loss: LossName = "fused"
    backend: Literal["triton", "cpu"] = "triton"

    @property
    def sequences(self) -> int:
        """Of a micro-batch: as many as its token budget holds, one at least."""
        longest = self.prompt_tokens + self.context_tokens + self.response_tokens
        return max(1, self.config.micro_batch_tokens // longest)

    @property
    def weight_sizes(self) -> list[int]:
        """Elements of each weight of the model."""
        model = empty_model(self.architecture, dtype=torch.bfloat16)
        return [parameter.numel() for parameter in model.parameters()]

    @property
    def parameters(self) -> int:
        """Of the model."""
        return sum(self.weight_sizes)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Phases of one update with `MICRO_BATCHES` micro-batches, in order; and between updates.

    Attributes:
        phases: of the update; a phase of a micro-batch appears once for each.
        resident: kind -> bytes on the GPU after the update, which stay through the rollouts.
        host: kind -> bytes in host memory, of this rank.
    """

    phases: list[Phase]
    resident: dict[str, int]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(phase.peak for phase in self.phases)


def simulate(scenario: Scenario) -> Simulation:
    """Runs two updates on fake tensors and records the second; the first makes optimiser states.

    Raises:
        RuntimeError: this process is part of a process group already.
    """
    tracker = StepTracker(
        rows=scenario.sequences * scenario.response_tokens, backend=scenario.backend
    )
    with ExitStack() as stack:
        stack.enter_context(_fake_world(scenario.world_size))
        stack.enter_context(mock.patch.object(transformers.masking_utils, "is_tracing", _no))
        stack.enter_context(watching_resizes(tracker))
        stack.callback(tracker.close)
        mesh = init_device_mesh("cpu", (scenario.world_size,))  # reads values: no fake tensors yet
        stack.enter_context(tracker)
        parts = _trainer(scenario, tracker, mesh)
        stack.enter_context(_phases(scenario, parts, tracker))
        _update(scenario, parts, micro_batches=1)
        tracker.phases.clear()
        _update(scenario, parts, micro_batches=MICRO_BATCHES)
        tracker.enter("between updates", kinds.ACTIVATIONS)
        tracker.settle()
        return Simulation(
            phases=tracker.phases[:-1],
            resident=tracker.phases[-1].by_kind(),
            host=tracker.host_by_kind(),
        )


def _no(*_: object) -> bool:
    """Not traced: masks are read, and a full one is dropped, as when the code runs for real."""
    return False


@contextmanager
def _fake_world(size: int) -> Iterator[None]:
    if dist.is_initialized():
        raise RuntimeError("hsd budget: found a process group, expected a process of its own")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _update(scenario: Scenario, parts: Any, *, micro_batches: int) -> None:
    rows = [_row(scenario, number) for number in range(micro_batches * scenario.sequences)]
    judged: Any = [(None, [SimpleNamespace(row=row) for row in rows])]
    train.update(parts, judged, 0)


def _row(scenario: Scenario, number: int) -> TrainingRow:
    student = (number,) * scenario.prompt_tokens
    count = scenario.response_tokens
    return TrainingRow(
        student_prompt=student,
        teacher_prompt=student + (0,) * scenario.context_tokens,
        response=(0,) * count,
        weights=(1.0,) * count,
        logprobs=(-1.0,) * count,
        advantage=1.0,
    )


def _trainer(scenario: Scenario, tracker: StepTracker, mesh: DeviceMesh) -> Any:
    """What `hsd.train.update` reads of a trainer."""
    config = scenario.config
    policy = _policy(scenario, tracker, mesh)
    return SimpleNamespace(
        config=config,
        policy=policy,
        optimizer=adamw(
            policy.model.parameters(),
            config.optimizer.learning_rate,
            on_host=config.sharding.offload == "optimizer",
        ),
        world=World(rank=0, size=scenario.world_size),
    )


def _policy(scenario: Scenario, tracker: StepTracker, mesh: DeviceMesh) -> Policy:
    """The trainer's own, from an architecture in the place of files."""
    config, architecture = scenario.config, scenario.architecture
    # What "auto" means on the machine that is simulated, not on this one.
    auto = scenario.backend == "triton" and config.model.compute_dtype == "auto"
    compute = torch.bfloat16 if auto else compute_dtype(config.model.compute_dtype)

    def load(
        *,
        frozen: bool = False,
        dtype: torch.dtype = torch.float32,
        adapters: Adapters | None = None,
    ) -> PreTrainedModel:
        model = empty_model(architecture, dtype=dtype)
        if adapters is not None:
            add_fake_adapters(model, adapters)
        shard_policy(model, config.sharding, mesh, compute_dtype=compute, frozen=frozen)
        return model.to_empty(device="cpu")

    def whole(*_: object) -> PreTrainedModel:
        return empty_model(architecture, dtype=torch.float32, device="cpu")

    if config.sharding.mode == "full":
        policy = sharded_policy(config, load, compute)
    else:
        # A copy of a fake tensor would copy memory that is not there.
        with mock.patch.object(trainer, "add_adapters", add_fake_adapters):
            policy = whole_policy(
                config, whole(), compute, copy_of=lambda *_: whole().requires_grad_(False)
            )
    for model in _models(policy):
        own, sharding = model is policy.model, config.sharding
        in_host_memory = sharding.offload == "all" if own else sharding.offload_reference
        kind = kinds.PARAMETERS if own else kinds.REFERENCE
        tracker.mark(list(model.parameters()), kind, on_host=in_host_memory)
    return policy


def _loss_flop(student_hidden: Tensor, arguments: Mapping[str, Any]) -> float:
    """Of the matrix products inside the fused loss."""
    rows, hidden_size = student_hidden.shape
    vocab_size = len(arguments["weight"])
    products = plan(
        rows,
        hidden_size,
        vocab_size,
        teacher=arguments["teacher_hidden"] is not None,
        reference="ref_hidden" in arguments,
        weight_gradient=arguments["weight"].requires_grad,
    ).gemms
    return products * 2 * rows * hidden_size * vocab_size


@contextmanager
def _phases(scenario: Scenario, parts: Any, tracker: StepTracker) -> Iterator[None]:
    """Tells the tracker when the update turns to something else."""
    policy, optimizer = parts.policy, parts.optimizer
    offload = scenario.config.sharding.offload
    # Of a micro-batch, in the order of `hidden_states`: one model may be teacher and reference.
    beside = [] if policy.teacher is None else ["teacher forward"]
    beside += ["reference forward"] if scenario.config.objective.reads_reference(0) else []
    names = itertools.cycle(beside)

    def forward(*_: object) -> None:
        name = "student forward" if torch.is_grad_enabled() else next(names)
        tracker.enter(name, kinds.ACTIVATIONS)

    def loss(*args: Any, **arguments: Any) -> Any:
        tracker.enter("loss", kinds.LOSS)
        tracker.mark(arguments.get("weight_grad_out"), kinds.UNSHARDED)
        found = _LOSSES[scenario.loss](*args, **arguments)
        if scenario.loss == "fused":
            tracker.add_flop(_loss_flop(args[0], arguments))
        tracker.enter("backward", kinds.ACTIVATIONS)
        return found

    def before_optimizer(*_: object) -> None:
        gradients = [each.grad for each in policy.model.parameters()]
        tracker.mark(gradients, kinds.GRADIENTS, on_host=offload == "all")
        tracker.enter("optimiser", kinds.WORKSPACE)

    def after_optimizer(*_: object) -> None:
        states = [list(state.values()) for state in optimizer.state.values()]
        tracker.mark(states, kinds.OPTIMIZER, on_host=offload != "none")

    hooks: list[Any] = [
        each.base_model.register_forward_pre_hook(forward) for each in _models(policy)
    ]
    hooks.append(optimizer.register_step_pre_hook(before_optimizer))
    hooks.append(optimizer.register_step_post_hook(after_optimizer))
    try:
        with mock.patch.object(step, "fused_hsd_loss", loss):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _models(policy: Policy) -> list[PreTrainedModel]:
    """The policy and those beside it, each once."""
    found = {id(each): each for each in (policy.model, policy.initial, policy.teacher) if each}
    return list(found.values())
