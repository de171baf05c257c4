"""The configuration of where weights, gradients and optimiser states live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsd.checks import require


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How one model is spread over the ranks, and what is done to fit it.

    Args:
        mode: "none": every rank has all weights; "full": each rank has its share of every weight,
            gradient and optimiser state (FSDP2), and gathers a layer while it runs.
        offload: to host memory: "optimizer", the optimiser's states, and its step runs there;
            "all", the shards of weights and gradients too (FSDP2's CPUOffloadPolicy).
        offload_reference: the shards of reference and frozen teachers stay in host memory.
        activation_checkpointing: a layer keeps its input alone and runs again in backward.
        compile_layers: torch.compile of each layer.
    """

    mode: Literal["none", "full"] = "none"
    offload: Literal["none", "optimizer", "all"] = "none"
    offload_reference: bool = False
    activation_checkpointing: bool = False
    compile_layers: bool = False

    def __post_init__(self) -> None:
        sharded = self.mode == "full"
        offload = self.offload
        expected = "sharding.mode = 'full' beside it"
        require("sharding.offload", offload, sharded or offload == "none", expected)
        reference = self.offload_reference
        require("sharding.offload_reference", reference, sharded or not reference, expected)
