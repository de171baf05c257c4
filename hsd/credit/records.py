"""What is known of one rollout's tokens, and its record in a file (docs/credit.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DECIMALS = 6
"""Digits of nats in the file."""


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """The k most likely tokens at each position, most likely first.

    Attributes:
        token_ids: (n, k).
        logprobs: (n, k) nats.
    """

    token_ids: Integers
    logprobs: Floats


@dataclass(frozen=True, kw_only=True)
class ContextCredit:
    """One teacher context's view of a rollout of n tokens; nats.

    Attributes:
        logprob: (n,) log q of the tokens.
        credit: (n,) A = log q - log p (arXiv 2606.15576).
        kl: (n,) KL(q || p) over the vocabulary.
        entropy: (n,) of q.
        top: of q.
    """

    logprob: Floats
    credit: Floats
    kl: Floats
    entropy: Floats
    top: TopTokens


@dataclass(frozen=True, kw_only=True)
class RolloutCredit:
    """One rollout of n tokens.

    Attributes:
        step, question, prompt, answer: of its group; answer is None where it is not known.
        index, group_size: its place in the group.
        group_correct: correct rollouts of the group.
        correct: the verifier's word.
        finish_reason: "stop", or "length" where it was cut.
        peer: index of its successful peer in the group.
        divergence: tau, the first index where it differs from its peer.
        text: the response without special tokens.
        token_ids: (n,).
        tokens: the text of each token.
        logprob: (n,) log p, nats.
        entropy: (n,) of p, nats.
        weight: (n,) of the token in the loss.
        top: of p.
        contexts: by name; a context that gives this rollout no teacher is absent.
    """

    step: int
    question: str
    prompt: str
    answer: str | None
    index: int
    group_size: int
    group_correct: int
    correct: bool
    finish_reason: str
    peer: int | None
    divergence: int | None
    text: str
    token_ids: Integers
    tokens: tuple[str, ...]
    logprob: Floats
    entropy: Floats
    weight: Floats
    top: TopTokens
    contexts: Mapping[str, ContextCredit]


_SCALARS = (
    "step",
    "question",
    "prompt",
    "answer",
    "index",
    "group_size",
    "group_correct",
    "correct",
    "finish_reason",
    "peer",
    "divergence",
    "text",
)
_CONTEXT_ARRAYS = ("logprob", "credit", "kl", "entropy")


def to_record(rollout: RolloutCredit) -> dict[str, Any]:
    """The rollout as JSON values: what both file formats hold."""
    record: dict[str, Any] = {key: getattr(rollout, key) for key in _SCALARS}
    record |= {
        "token_ids": rollout.token_ids.tolist(),
        "tokens": list(rollout.tokens),
        "logprob": _rounded(rollout.logprob),
        "entropy": _rounded(rollout.entropy),
        "weight": [float(f"{weight:.7g}") for weight in rollout.weight],
        "top": _top_to_dict(rollout.top),
        "contexts": {
            name: {
                **{key: _rounded(getattr(context, key)) for key in _CONTEXT_ARRAYS},
                "top": _top_to_dict(context.top),
            }
            for name, context in rollout.contexts.items()
        },
    }
    return record


def from_record(record: Mapping[str, Any]) -> RolloutCredit:
    """The inverse of `to_record`.

    Raises:
        ValueError: it is no such record.
    """
    try:
        return RolloutCredit(
            **{key: record[key] for key in _SCALARS},
            token_ids=np.array(record["token_ids"], dtype=np.int64),
            tokens=tuple(record["tokens"]),
            logprob=_floats(record["logprob"]),
            entropy=_floats(record["entropy"]),
            weight=_floats(record["weight"]),
            top=_top_from_dict(record["top"]),
            contexts={
                name: ContextCredit(
                    **{key: _floats(context[key]) for key in _CONTEXT_ARRAYS},
                    top=_top_from_dict(context["top"]),
                )
                for name, context in record["contexts"].items()
            },
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"found no record of a rollout's credit ({error!r})") from None


def _rounded(values: Floats) -> list[float | None]:
    """NaN and infinities, which JSON lacks, become null."""
    return [round(v, DECIMALS) if math.isfinite(v) else None for v in values.tolist()]


def _floats(values: list[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _top_to_dict(top: TopTokens) -> dict[str, Any]:
    return {
        "token_ids": top.token_ids.tolist(),
        "logprobs": [_rounded(row) for row in top.logprobs],
    }


def _top_from_dict(values: Mapping[str, Any]) -> TopTokens:
    rows = [_floats(row) for row in values["logprobs"]]
    return TopTokens(
        token_ids=np.array(values["token_ids"], dtype=np.int64).reshape(len(rows), -1),
        logprobs=np.array(rows, dtype=np.float64).reshape(len(rows), -1),
    )
