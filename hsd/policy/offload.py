"""AdamW whose states live in host memory and whose step runs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hsd.distributed.fsdp import local_part

_STATES = ("exp_avg", "exp_avg_sq")


class HostAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with its states in host memory.

    Weights and gradients stay where they are: one parameter after the other is copied to the host
    with its gradient, stepped there and copied back, and the next one's copies are under way
    meanwhile. The step takes no device memory; of host memory, beside the states, twice a weight
    and a gradient of the largest shard, pinned. Where the weights are in host memory there are no
    copies, and it is `AdamW(fused=True)` bit for bit.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            pairs = [(local_part(each), local_part(each.grad)) for each in parameters]
            on_host = all(weight.device.type == "cpu" for weight, _ in pairs)
            # The pairs come first: the last weight is written back as they end.
            for (weight, gradient), parameter in zip(
                pairs if on_host else _staged(pairs), parameters, strict=True
            ):
                state = self._host_state(parameter)
                adamw(
                    [weight],
                    [gradient],
                    [local_part(state["exp_avg"])],
                    [local_part(state["exp_avg_sq"])],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )

    def _host_state(self, parameter: Tensor) -> dict[str, Any]:
        """AdamW's own names and forms, so that state dicts are AdamW's."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in _STATES:
                state[name] = torch.zeros_like(parameter, device="cpu")
        for name in ("step", *_STATES):  # load_state_dict puts them beside the parameter
            if local_part(state[name]).device.type != "cpu":
                state[name] = state[name].cpu()
        return state


def _staged(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of weight and gradient in pinned memory; each weight is written back in the end."""
    largest = max(weight.numel() for weight, _ in pairs)
    staging = torch.empty((2, 2, largest), dtype=torch.float32, pin_memory=True)
    compute, copies = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    copies.wait_stream(compute)

    def fetch(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
        # All copies are on one stream: a slot is written back before it is filled again.
        slots = [
            slot[: source.numel()].view_as(source)
            for slot, source in zip(staging[index % 2], pairs[index], strict=True)
        ]
        with torch.cuda.stream(copies):
            for slot, source in zip(slots, pairs[index], strict=True):
                slot.copy_(source, non_blocking=True)
            return slots, copies.record_event()

    fetched = fetch(0)
    for index, (target, _) in enumerate(pairs):
        (weight, gradient), arrived = fetched
        if index + 1 < len(pairs):
            fetched = fetch(index + 1)
        arrived.synchronize()
        yield weight, gradient
        with torch.cuda.stream(copies):
            target.copy_(weight, non_blocking=True)
    compute.wait_stream(copies)
    copies.synchronize()  # the pinned buffers end here
