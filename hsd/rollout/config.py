"""The configuration of the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from hsd.checks import require

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN_ARGUMENTS = (
    "--host",
    "--port",
    "--dtype",
    "--logprobs-mode",
    "--generation-config",
    "--enable-scale-out",
    "--enable-sleep-mode",
    "--weight-transfer-config",
    "--tensor-parallel-size",
    "-tp",
)
"""Arguments of `vllm serve` that the trainer sets itself."""
OWN_KEYWORDS = (
    "model",
    "dtype",
    "logprobs-mode",
    "generation-config",
    "enable-sleep-mode",
    "seed",
)
"""Of vLLM's class LLM likewise, with dashes."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What samples the rollouts; docs/engines.md.

    Args:
        kind: "hf", transformers' generate in this process; "vllm", servers over HTTP, of this
            machine; "vllm_colocated", vLLM in this process, on the trainer's own GPU.
        tolerance: nats; how far the engine's log-probs may be from the trainer's at the start,
            in the mean over the tokens of a fixed prompt's rollouts.
        urls: servers that run already, dealt out to the ranks; none: the trainer starts `replicas`.
        python: the Python that starts a server, of the environment with vLLM; None for this one.
        replicas: servers that each rank starts; where they are shared, each machine.
        tensor_parallel: GPUs that each of these servers divides the weights among.
        shared: the first rank of a machine has its servers, and asks them for all of its ranks;
            else each rank has servers of its own.
        devices: CUDA_VISIBLE_DEVICES of each server of the machine, such as "4" or "4,5"; none:
            the trainer's own GPUs in order, `tensor_parallel` for each server.
        arguments: of `vllm serve`, more than the trainer sets itself; of the class LLM,
            "key=value" with a JSON value, where the engine is colocated.
        environment: variables of a server, over the trainer's own.
        sleep: servers free their memory while the policy is updated; needs a GPU.
        weight_sync: "files", through a directory that trainer and servers see; "nccl", vLLM's own
            weight transfer from GPU to GPU.
        sync_directory: of the files; None for a temporary one.
        start_timeout: seconds for a server to answer after its start.
        request_timeout: seconds for one group of rollouts, after which its server counts as dead.
    """

    kind: Literal["hf", "vllm", "vllm_colocated"] = "hf"
    tolerance: float = 0.1
    urls: tuple[str, ...] = ()
    python: Path | None = None
    replicas: int = 1
    tensor_parallel: int = 1
    shared: bool = False
    devices: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    sleep: bool = False
    weight_sync: Literal["files", "nccl"] = "files"
    sync_directory: Path | None = None
    start_timeout: float = 600.0
    request_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("replicas", "tensor_parallel"):
            require(f"engine.{name}", getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("tolerance", "start_timeout", "request_timeout"):
            require(f"engine.{name}", getattr(self, name), getattr(self, name) > 0, "> 0")
        for url in self.urls:
            _require_loopback(url)
        for argument in self.arguments:
            word = argument.split("=")[0].replace("_", "-")
            # vLLM takes the beginning of an option for the option.
            free = not word.startswith("-") or not any(o.startswith(word) for o in OWN_ARGUMENTS)
            free = free and (self.kind != "vllm_colocated" or word not in OWN_KEYWORDS)
            require("engine.arguments", argument, free, "none that the trainer sets itself")
        self._require_applicable()

    def _require_applicable(self) -> None:
        """Raises where an option is set that this kind of engine does not read."""
        server, colocated = self.kind == "vllm", self.kind == "vllm_colocated"
        own = server and not self.urls
        groups: tuple[tuple[bool, str, tuple[str, ...]], ...] = (
            (
                own,
                "engine.kind = 'vllm' without engine.urls",
                ("python", "replicas", "tensor_parallel", "devices", "environment"),
            ),
            (own or colocated, "a vLLM that the trainer starts", ("arguments",)),
            (
                server,
                "engine.kind = 'vllm'",
                ("urls", "shared", "sleep", "weight_sync", "start_timeout", "request_timeout"),
            ),
            (server or colocated, "a vLLM engine", ("sync_directory",)),
        )
        for applicable, needed, names in groups:
            for name in names:
                value = getattr(self, name)
                default = {} if name == "environment" else self.__dataclass_fields__[name].default
                unset = applicable or value == default
                require(f"engine.{name}", value, unset, f"{needed} beside it")


def _require_loopback(url: str) -> None:
    """Refuses what other machines could reach: who can, replaces weights and runs methods there."""
    try:
        parts = urlsplit(url)
        local = parts.scheme == "http" and parts.hostname in LOOPBACK
        plain = url.rstrip("/") == f"http://{parts.netloc}" and "@" not in url
        allowed = local and plain and parts.port != 0 and not parts.netloc.endswith(":")
    except ValueError:  # a port that is no number up to 65535, a bracket without its other
        allowed = False
    require(
        "engine.urls",
        url,
        allowed,
        f"http://HOST:PORT with a host of {', '.join(LOOPBACK)}: the development endpoints of a "
        "server must not be open to other machines; reach one there through an ssh tunnel",
    )
