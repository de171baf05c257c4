"""What a rollout engine takes and gives. Responses are token ids from the engine to the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample.

    Attributes:
        max_new_tokens: a rollout that reaches it is cut.
        temperature: 0 is greedy.
        top_p: nucleus, 1 for the whole vocabulary.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response.

    Attributes:
        token_ids: the response with its end-of-sequence token, if it came to one.
        logprobs: nats, of each token under the policy at the sampling temperature, before top_p.
        loss_mask: tokens that the policy chose; false for a tool's or an environment's.
        finish_reason: "stop" at an end-of-sequence token, "length" where it was cut.
        policy_version: steps of training of the weights that sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    loss_mask: tuple[bool, ...]
    finish_reason: Literal["stop", "length"]
    policy_version: int


class EngineError(ConnectionError):
    """An engine cannot be reached or started, or answers what cannot be used."""


class RolloutEngine(Protocol):
    """Samples groups of rollouts from the weights it was given last."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        group_size: int,
        sampling: Sampling,
    ) -> list[list[Rollout]]:
        """A group of rollouts per prompt; each prompt's are drawn from its own seed.

        Every rank calls it equally often, one without prompts too: ranks may share an engine.
        """
        ...

    def update_weights(self, model: PreTrainedModel, *, version: int) -> None:
        """Takes the policy's weights after `version` steps of training, and wakes the engine."""
        ...

    def sleep(self) -> None:
        """Frees what memory it can until the next `update_weights`; not all engines do."""
        ...

    def health(self) -> dict[str, float]:
        """What to log of it in a step.

        Raises:
            EngineError: it cannot sample.
        """
        ...

    def close(self) -> None:
        """Ends what it started. It cannot be used afterwards."""
        ...


def response_text(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """What a verifier and a teacher read of a rollout: no special tokens."""
    return str(tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: of the model's generation config, and of the tokenizer."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def stream_seed(*parts: object) -> int:
    """A 63-bit seed for the random stream that `parts` name; equal in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
