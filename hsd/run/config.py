"""The configuration of what survives a stop, and of what a step that fails numerically does."""

from __future__ import annotations

from dataclasses import dataclass

from hsd.checks import require


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How a run is kept alive.

    Args:
        keep: checkpoints to resume from that stay, the newest ones.
        max_skipped_steps: steps in a row that may skip an update because its loss or gradient is
            not finite; one more ends the run.
    """

    keep: int = 2
    max_skipped_steps: int = 3

    def __post_init__(self) -> None:
        require("recovery.keep", self.keep, self.keep >= 1, ">= 1")
        skipped = self.max_skipped_steps
        require("recovery.max_skipped_steps", skipped, skipped >= 0, ">= 0")
