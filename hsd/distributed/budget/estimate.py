"""What is calculated beside the simulation: the engine's memory, and a modelled step time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from hsd.distributed.budget import kinds
from hsd.distributed.budget.architecture import kv_cache_bytes
from hsd.distributed.budget.simulate import MICRO_BATCHES, Scenario, Simulation


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a budget rests on beside the simulation; printed with it. Of an H100 SXM node.

    Attributes:
        context_bytes: CUDA context, NCCL buffers and a sleeping engine, of each GPU; with what
            the ranks of an engine over several GPUs keep to exchange.
        fragmentation: of the peak, lost between blocks of the caching allocator.
        flops: FLOP per second and GPU of bf16 products.
        utilisation: share of them that layers and loss reach.
        gpus_per_node: ranks that share NVLink and host.
        node_bandwidth: bytes per second and GPU of a collective within a node.
        network_bandwidth: the same, over several nodes.
        host_link: bytes per second and GPU, one direction, between GPU and host.
        host_memory: bytes per second and GPU of an optimiser that steps on the host.
        gpu_memory: bytes per second and GPU.
        decoding: share of gpu_memory that the engine's decoding reaches.
    """

    context_bytes: int = 2_000_000_000
    fragmentation: float = 0.05
    flops: float = 989e12
    utilisation: float = 0.4
    gpus_per_node: int = 8
    node_bandwidth: float = 300e9
    network_bandwidth: float = 40e9
    host_link: float = 50e9
    host_memory: float = 20e9
    gpu_memory: float = 3.35e12
    decoding: float = 0.5

    def described(self) -> str:
        """What the modelled seconds rest on."""
        return (
            f"{self.utilisation:.0%} of {self.flops / 1e12:.0f} TFLOP/s; collectives at "
            f"{self.node_bandwidth / 1e9:.0f} GB/s in a node of {self.gpus_per_node} and "
            f"{self.network_bandwidth / 1e9:.0f} GB/s beyond, hidden behind products; host link "
            f"{self.host_link / 1e9:.0f} GB/s; optimiser on the host at "
            f"{self.host_memory / 1e9:.0f} GB/s; decoding at {self.decoding:.0%} of "
            f"{self.gpu_memory / 1e12:.2f} TB/s; every response of full length"
        )

    def needed(self, peak: int) -> int:
        """Bytes of a GPU that a simulated peak needs."""
        return math.ceil(peak * (1 + self.fragmentation)) + self.context_bytes


def assumed(scenario: Scenario) -> Assumptions:
    """For a scenario: a rank of a tensor-parallel engine sleeps with its NCCL buffers, 1 GB."""
    found = Assumptions()
    more = 10**9 if scenario.engine_gpus > 1 else 0
    return dataclasses.replace(found, context_bytes=found.context_bytes + more)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The engine awake, on the trainer's GPUs; bytes of one GPU.

    Attributes:
        weights: bf16, divided among the GPUs of an engine.
        gathered: the largest weight in bf16, whole on each rank of a sharded trainer while it goes
            to the engine.
        cache: what is left for keys and values.
        at_a_time: rollouts of full length whose keys and values fit, of one GPU.
    """

    weights: int
    gathered: int
    cache: int
    at_a_time: float


def rollouts(
    scenario: Scenario,
    simulation: Simulation,
    gpu_bytes: int,
    assumptions: Assumptions,
) -> Rollouts:
    """Calculated: what the trainer keeps between updates stays, the engine takes the rest."""
    weights = math.ceil(2 * scenario.parameters / scenario.engine_gpus)
    resident = assumptions.needed(sum(simulation.resident.values()))
    cache = max(0, gpu_bytes - resident - weights)
    tokens = scenario.prompt_tokens + scenario.response_tokens
    needed = kv_cache_bytes(scenario.architecture) * tokens
    sharded = scenario.config.sharding.mode == "full"
    return Rollouts(
        weights=weights,
        gathered=2 * max(scenario.weight_sizes) if sharded else 0,
        cache=cache,
        at_a_time=cache / needed,
    )


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """One rank's step, all micro-batches: work, and seconds modelled from it.

    Attributes:
        micro_batches: of the rank.
        flop: of all passes and the loss.
        traffic: collective -> bytes.
        seconds: part of the step -> seconds; "update" is the larger of products and collectives.
    """

    micro_batches: int
    flop: float
    traffic: dict[str, int]
    seconds: dict[str, float]


def estimate_step(
    scenario: Scenario, simulation: Simulation, sampling: Rollouts, assumptions: Assumptions
) -> StepEstimate:
    """Modelled for the longest responses."""
    rollout = scenario.config.rollout
    rows = math.ceil(rollout.questions_per_step * rollout.group_size / scenario.world_size)
    count = math.ceil(rows / scenario.sequences)
    first, last = _halves(simulation)
    flop = (count - 1) * first.flop + last.flop
    traffic = {
        name: (count - 1) * first.traffic[name] + last.traffic[name]
        for name in {*first.traffic, *last.traffic}
    }
    one_node = scenario.world_size <= assumptions.gpus_per_node
    bandwidth = assumptions.node_bandwidth if one_node else assumptions.network_bandwidth
    products = flop / (assumptions.flops * assumptions.utilisation)
    collectives = sum(traffic.values()) * (1 - 1 / scenario.world_size) / bandwidth
    return StepEstimate(
        micro_batches=count,
        flop=flop,
        traffic=traffic,
        seconds={
            "rollouts": _decoding(scenario, sampling, rows, assumptions),
            "products": products,
            "collectives": collectives,
            "update": max(products, collectives)
            + _reference_copies(simulation, count, assumptions),
            "optimiser": _optimizer(simulation, assumptions),
        },
    )


@dataclass
class _Work:
    flop: float
    traffic: Counter[str]


def _halves(simulation: Simulation) -> tuple[_Work, _Work]:
    """The first and the last micro-batch; the optimiser is with the last."""
    starts = [index for index, phase in enumerate(simulation.phases) if phase.name == "loss"]
    middle = starts[len(starts) // MICRO_BATCHES - 1] + 2  # behind its backward
    found = []
    for part in (simulation.phases[:middle], simulation.phases[middle:]):
        traffic = sum((phase.traffic for phase in part), Counter[str]())
        found.append(_Work(sum(phase.flop for phase in part), traffic))
    return found[0], found[1]


def _decoding(scenario: Scenario, sampling: Rollouts, rows: int, assumptions: Assumptions) -> float:
    """Bound by reads: the weights at every token, and half of the final keys and values."""
    at_a_time = min(rows, math.floor(sampling.at_a_time))
    if at_a_time < 1:
        return math.inf
    tokens = scenario.prompt_tokens + scenario.response_tokens / 2
    read = sampling.weights + at_a_time * tokens * kv_cache_bytes(scenario.architecture)
    a_token = read / (assumptions.gpu_memory * assumptions.decoding)
    return math.ceil(rows / at_a_time) * scenario.response_tokens * a_token


def _reference_copies(simulation: Simulation, count: int, assumptions: Assumptions) -> float:
    """An offloaded reference comes from the host once a micro-batch."""
    return count * simulation.host[kinds.REFERENCE] / assumptions.host_link


def _optimizer(simulation: Simulation, assumptions: Assumptions) -> float:
    """Bound by reads and writes: weight, gradient, two states read; three of them written."""
    states = simulation.host[kinds.OPTIMIZER]
    if states:
        weights = states / 2
        return 3 * weights / assumptions.host_link + 7 * weights / assumptions.host_memory
    # Two states to a weight that is trained, which with adapters most are not.
    return 7 * simulation.resident[kinds.OPTIMIZER] / 2 / assumptions.gpu_memory
