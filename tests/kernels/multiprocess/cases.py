"""What the ranks of test_sharded.py solve, and how a head or a sequence is cut for them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from kernel_problems import Draw, cast

LEARNED = ("student_hidden", "weight", "bias")
VOCAB = 37
# Rows of the head by rank, for 2 and for 3 ranks. "padded" gives one rank padding alone.
SPLITS: dict[int, dict[str, list[int]]] = {
    2: {"even": [20, 20], "uneven": [7, 33], "padded": [37, 3]},
    3: {"uneven": [3, 30, 7], "padded": [30, 7, 3]},
}
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "terms": {"divergence": "jsd", "entropy_coef": 0.1, "kl_temperature": 0.7},
    "softcap": {"logit_softcap": 3.0, "max_chunk_bytes": 2 * VOCAB * 4 * 5},
    "sparse": {"sparse_tolerance": 1e-7, "sparse_max_columns": VOCAB},
    "triton": {"divergence": "jsd", "jsd_beta": 0.3, "backend": "triton"},
}
OURS = ("sparse_tolerance", "sparse_max_columns", "backend")  # what the dense reference has not
STATISTICS = ("forward_kl", "entropy", "logprob")


def problem(case: str) -> dict[str, Any]:
    """A head of 40 rows, 37 of them in use."""
    draw = Draw((11,), 8, 40)
    given = draw.problem() | {"vocab_size": VOCAB, "token_weights": draw.masked()}
    given["targets"] = given["targets"] % VOCAB
    if case == "terms":
        given |= {"ref_hidden": draw.states(), "ref_weight": draw.head(), "ref_coef": 0.3}
        given |= {"advantages": draw.per_token(-1, 1)}
    return cast(given, torch.float32) | CASES[case]


def own_loss(statistics, inputs):
    """A token loss of several statistics."""
    ratio = (statistics["logprob"] - inputs["old_logprob"]).exp().clamp(max=2)
    return ratio * statistics["forward_kl"] + statistics["jsd"] * statistics["entropy"]


def own_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Of `fused_token_loss`."""
    old = torch.full((11,), -3.0, dtype=given["token_weights"].dtype)
    return {**given, "token_loss": own_loss, "token_inputs": {"old_logprob": old}}


def coupled(given: dict[str, Any], solve: Any) -> dict[str, torch.Tensor]:
    """Statistics by name, and a loss of them that couples tokens."""
    names = ("student_hidden", "teacher_hidden", "weight", "bias", "targets", "vocab_size")
    options = {n: given[n] for n in ("backend", "process_group") if n in given}
    found = solve(**{n: given[n] for n in names}, statistics=STATISTICS, **options)
    values = {name: getattr(found, name) for name in STATISTICS}
    return values | {"loss": values["forward_kl"].sum() * values["entropy"].sum()}


def shard(given: dict[str, Any], sizes: list[int], rank: int) -> dict[str, Any]:
    """The rank's rows of every head."""
    end = list(accumulate(sizes))[rank]
    own = slice(end - sizes[rank], end)
    heads = ("weight", "bias", "ref_weight")
    return {name: value[own] if name in heads else value for name, value in given.items()}


def own_tokens(size: int, rank: int) -> torch.Tensor:
    """Of a sequence of 11, those of a rank as context parallelism deals them out: two pieces, one
    from each half, so that every rank attends to as much."""
    pieces = torch.arange(11).tensor_split(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


def part_of_sequence(given: dict[str, Any], size: int, rank: int) -> dict[str, Any]:
    """The rank's tokens, of everything that there is one of per token."""
    tokens = own_tokens(size, rank)
    return {
        name: value[tokens] if isinstance(value, torch.Tensor) and len(value) == 11 else value
        for name, value in given.items()
    }
