"""Made-up rollouts with credit, and the reading of a page, for tests."""

from __future__ import annotations

import base64
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsd.credit.html import write_page
from hsd.credit.records import ContextCredit, Floats, RolloutCredit, TopTokens
from hsd.credit.summary import CreditSummary

CONTEXTS = ("answer_peer", "answer")
NATS = ("logprob", "kl", "entropy")
WORDS = ("so", " 12", " +", "the", "\n", ".", " x", " therefore", "é", "<|end|>")


def make_rollout(
    length: int,
    *,
    seed: int = 0,
    index: int = 0,
    group_size: int = 2,
    group_correct: int = 1,
    correct: bool = False,
    peer: int | None = 1,
    divergence: int | None = None,
    question: str = "q",
    credits: dict[str, Sequence[float]] | None = None,
    contexts: Sequence[str] = CONTEXTS,
    **changes: Any,
) -> RolloutCredit:
    """Random numbers, but for what is given; `credits` are A per context."""
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(1.0, length)
    if credits is None:
        credits = {name: rng.normal(0, 1, length).tolist() for name in contexts}
    token_ids = rng.integers(0, len(WORDS), length)
    parts: dict[str, Any] = {
        "step": 1,
        "question": question,
        "prompt": f"Prompt of {question}.",
        "answer": "42",
        "index": index,
        "group_size": group_size,
        "group_correct": group_correct,
        "correct": correct,
        "finish_reason": "stop",
        "peer": peer,
        "divergence": divergence,
        "text": "".join(WORDS[i] for i in token_ids),
        "token_ids": token_ids,
        "tokens": tuple(WORDS[i] for i in token_ids),
        "logprob": logprob,
        "entropy": rng.exponential(1.0, length),
        "weight": np.full(length, 1 / length),
        "top": _top(rng, length),
        "contexts": {
            name: ContextCredit(
                logprob=logprob + np.array(values),
                credit=np.array(values, dtype=np.float64),
                kl=rng.exponential(0.5, length),
                entropy=rng.exponential(1.0, length),
                top=_top(rng, length),
            )
            for name, values in credits.items()
        },
    }
    return RolloutCredit(**{**parts, **changes})


def _top(rng: np.random.Generator, length: int, columns: int = 5) -> TopTokens:
    return TopTokens(
        token_ids=np.argsort(rng.random((length, len(WORDS))), axis=1)[:, :columns],
        logprobs=-np.sort(rng.exponential(1.0, (length, columns)), axis=1),
    )


def make_groups(groups: int, group_size: int, length: int) -> Iterator[RolloutCredit]:
    """Groups whose rollout 0 is correct and the peer of the others; those leave it midway."""
    for group in range(groups):
        for index in range(group_size):
            yield make_rollout(
                length,
                seed=group * group_size + index,
                index=index,
                group_size=group_size,
                correct=index == 0,
                peer=None if index == 0 else 0,
                divergence=None if index == 0 else length // 2,
                question=f"question {group}",
            )


def about(title: str = "test", contexts: Sequence[str] = CONTEXTS) -> dict[str, Any]:
    return {
        "title": title,
        "source": "made up",
        "model": "none",
        "temperature": 1.0,
        "compute_dtype": "float32",
        "contexts": list(contexts),
    }


def summarise(rollouts: Iterator[RolloutCredit]) -> dict[str, Any]:
    summary = CreditSummary()
    for rollout in rollouts:
        summary.add(rollout)
    return summary.to_dict()


class StandInTokenizer:
    """Gives the words above their ids back."""

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return WORDS[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(WORDS[token_id] for token_id in token_ids)


def build_page(path: Path, records: Callable[[], Iterator[RolloutCredit]], **options: Any) -> Path:
    """Writes the page of made-up rollouts."""
    write_page(
        path,
        records,
        about=about(),
        summary=summarise(records()),
        tokenizer=StandInTokenizer(),  # type: ignore[arg-type]
        **options,
    )
    return path


def data_scripts(page: Path) -> dict[str, str]:
    """The data blocks of a page by id."""
    found = re.findall(
        r'<script type="[a-z/]+" id="([^"]+)">([^<]*)</script>', page.read_text(encoding="utf-8")
    )
    return dict(found)


def unpack_context(block: str) -> dict[str, Any]:
    """A block of one context as the docstring of hsd.credit.packing describes it."""
    words = np.frombuffer(_bytes_of_words(block), dtype="<i4")
    n, m, k = (int(word) for word in words[:3])
    ends = np.cumsum([3, n, n, n, m, m * k, m * k])
    parts = [words[a:b] for a, b in itertools.pairwise(ends.tolist())]
    assert ends[-1] == len(words)
    logprob, kl, entropy, positions, ids, logprobs = parts
    return {
        **{key: part / 2**16 for key, part in zip(NATS, (logprob, kl, entropy), strict=True)},
        "positions": positions,
        "token_ids": ids.reshape(m, k),
        "logprobs": logprobs.reshape(m, k) / 2**16,
    }


def page_index(page: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads(data_scripts(page)["index"])
    return index


def _bytes_of_words(block: str) -> bytes:
    planes = zlib.decompress(base64.b64decode(block))
    count = len(planes) // 4
    return bytes(planes[plane * count + i] for i in range(count) for plane in range(4))


def unpack(block: str, contexts: int) -> dict[str, Any]:
    """A block as the docstring of hsd.credit.packing describes it."""
    words = np.frombuffer(_bytes_of_words(block), dtype="<u4")
    n, m, k = (int(word) for word in words[:3])
    at = 3

    def take(length: int) -> Any:
        nonlocal at
        at += length
        return words[at - length : at]

    def nats(length: int) -> Floats:
        values = take(length).view("<i4").astype(np.float64)
        return np.where(values == -(2**31), np.nan, values / 2**16)

    found: dict[str, Any] = {
        "token_ids": take(n),
        "logprob": nats(n),
        "entropy": nats(n),
        "weight": take(n).view("<f4"),
        "contexts": [
            {"logprob": nats(n), "kl": nats(n), "entropy": nats(n)} for _ in range(contexts)
        ],
        "positions": take(m),
    }
    found["tops"] = [
        {"token_ids": take(m * k).reshape(m, k), "logprobs": nats(m * k).reshape(m, k)}
        for _ in range(contexts + 1)
    ]
    assert at == len(words)
    return found
