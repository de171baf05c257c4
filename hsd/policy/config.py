"""The configuration of adapters."""

from __future__ import annotations

from dataclasses import dataclass

from hsd.checks import require


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained instead of all weights; docs/adapters.md.

    Args:
        rank: of the update of each weight; 0 for no adapter: all weights are trained.
        alpha: the update is alpha / rank times the product of the two factors.
        target_modules: ends of names of linear layers, such as "q_proj"; none: all linear layers
            but the output head.
    """

    rank: int = 0
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require("adapter.rank", self.rank, self.rank >= 0, "an integer >= 0")
        require("adapter.alpha", self.alpha, self.alpha > 0, "> 0")
        for name in ("alpha", "target_modules"):
            value = getattr(self, name)
            unset = self.rank > 0 or value == getattr(AdapterConfig, name)
            require(f"adapter.{name}", value, unset, "adapter.rank beside it")
