"""The numbers of one rollout as a block of text that the page decodes when it shows them.

A block is base64 of a zlib stream of 32-bit little-endian words whose bytes are stored in four
planes (all first bytes, all second bytes, ...), which compress better. The words, for n tokens, m
positions with top tokens, k of them, and the contexts that give the rollout a teacher:

    n, m, k
    token_ids (n), logprob (n), entropy (n), weight (n, float32)
    per context: logprob (n), kl (n), entropy (n)
    positions (m)
    for the student, then per context: token_ids (m, k), logprobs (m, k)

A block of one context, for the files beside a page:

    n, m, k
    logprob (n), kl (n), entropy (n)
    positions (m)
    token_ids (m, k), logprobs (m, k)

Nats are integers in units of 2^-16 (an error of 8e-6 at most); MISSING stands for NaN.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hsd.credit.records import Floats, RolloutCredit, TopTokens

UNIT = 2.0**-16
MISSING = -(2**31)

Words = NDArray[np.uint32]


def pack(rollout: RolloutCredit, contexts: Sequence[str], *, top_share: float) -> str:
    """The block of a rollout.

    Args:
        contexts: names, in the order of the page.
        top_share: of the tokens, those with the largest |A| in any context, that keep their top
            tokens; 0 to 1.
    """
    present = [rollout.contexts[name] for name in contexts if name in rollout.contexts]
    positions = top_positions(rollout, top_share)
    tops = [rollout.top, *(context.top for context in present)]
    columns = rollout.top.token_ids.shape[1]
    words = [
        np.array([len(rollout.token_ids), len(positions), columns], dtype=np.uint32),
        rollout.token_ids.astype(np.uint32),
        _nats(rollout.logprob),
        _nats(rollout.entropy),
        rollout.weight.astype(np.float32).view(np.uint32),
        *(
            _nats(values)
            for context in present
            for values in (context.logprob, context.kl, context.entropy)
        ),
        positions.astype(np.uint32),
        *(part for top in tops for part in _top_words(top, positions)),
    ]
    return _block(words)


def pack_context(rollout: RolloutCredit, name: str, *, top_share: float) -> str:
    """The block of one context of a rollout; arguments as of `pack`."""
    context = rollout.contexts[name]
    positions = top_positions(rollout, top_share)
    shape = [len(rollout.token_ids), len(positions), context.top.token_ids.shape[1]]
    words = [
        np.array(shape, dtype=np.uint32),
        *(_nats(values) for values in (context.logprob, context.kl, context.entropy)),
        positions.astype(np.uint32),
        *_top_words(context.top, positions),
    ]
    return _block(words)


def _block(words: Sequence[Words]) -> str:
    data = np.concatenate(words).astype("<u4")
    planes = np.ascontiguousarray(data.view(np.uint8).reshape(-1, 4).T)
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode("ascii")


def top_positions(rollout: RolloutCredit, share: float) -> NDArray[np.int64]:
    """In ascending order the ceil(share * n) positions with the largest |A| in any context.

    Of equal ones the earlier.
    """
    count = math.ceil(share * len(rollout.token_ids))
    credits = [np.abs(context.credit) for context in rollout.contexts.values()]
    if not credits:
        return np.arange(count)
    largest = np.nan_to_num(np.max(credits, axis=0))
    return np.sort(np.argsort(-largest, kind="stable")[:count])


def _nats(values: Floats) -> Words:
    largest = 2**31 - 1
    scaled = np.clip(np.nan_to_num(values) / UNIT, -largest, largest)
    words = np.where(np.isnan(values), MISSING, np.rint(scaled))
    return words.astype(np.int64).astype(np.int32).view(np.uint32)


def _top_words(top: TopTokens, positions: NDArray[np.int64]) -> tuple[Words, Words]:
    ids = top.token_ids[positions].reshape(-1)
    return ids.astype(np.uint32), _nats(top.logprobs[positions].reshape(-1))
