"""The configuration of logging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsd.checks import require


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is shown and sent beside metrics.jsonl and rollouts.jsonl, which are always written.

    Args:
        completions_every: steps between tables of rollouts with reward, peer and context length,
            of show_samples lines; 0 for none.
        tensorboard: write event files to `tensorboard/` of the run folder; needs the extra
            `tensorboard`.
        wandb_project: Weights & Biases project that gets the run; None for none; needs the extra
            `wandb`.
        wandb_mode: "offline" keeps the run in `wandb/` of the run folder, for `wandb sync`.
    """

    completions_every: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"

    def __post_init__(self) -> None:
        every, project, mode = self.completions_every, self.wandb_project, self.wandb_mode
        require("logging.completions_every", every, every >= 0, ">= 0")
        require("logging.wandb_project", project, project != "", "a name, or none")
        require("logging.wandb_mode", mode, mode in ("online", "offline"), "online or offline")
        online = mode == "online" or project is not None
        require("logging.wandb_mode", mode, online, "logging.wandb_project beside it")
