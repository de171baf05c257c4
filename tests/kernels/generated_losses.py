"""Generated calls of `fused_hsd_loss`: sides, heads, terms and options of all kinds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from kernel_problems import (
    Arguments,
    Draw,
    cast,
    likely_token,
    scale_and_height,
    step,
    truth,
)
from torch import Tensor
from torch.nn.functional import pad

FULL = bool(os.environ.get("HSD_FULL_GRID"))
# Rows are interpreted one after the other: 300 take as long as six times 48.
MOST_ROWS = (48, 48, 48, 48, 48, 48, 48, 300) if FULL else (48,)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("ordinary", "one offset", "both offset", "identical", "one-hot", "wide")


@dataclass(frozen=True)
class Case:
    """A call of `fused_hsd_loss` in its dtype, and whether its sides are the same."""

    arguments: Arguments
    frozen: tuple[str, ...]
    upstream: float
    identical: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["student_hidden"].dtype


def sides(
    kind: str, tokens: Draw, *, kl: float, entropy: float, offset: float
) -> dict[str, Tensor]:
    """fp64 states of three sides and their head.

    Two coordinates serve one purpose each: the first raises the likely token, the second all logits
    by `offset`.
    """
    count, noisy = tokens.lead[0], tokens.hidden - 2
    weight = tokens.normal(tokens.vocab, tokens.hidden) / noisy**0.5
    weight[:, 0], weight[:, 1] = likely_token(weight[:, 0]), 1
    student, *others = (tokens.states() for _ in range(3))
    for states in (student, *others):
        states[:, :2] = 0
    if kind == "wide":  # logits to +-80
        found = [80 * s / (s @ weight.T).abs().amax(-1, keepdim=True) for s in (student, *others)]
    else:
        reachable = min(entropy, 0.7 * math.log(tokens.vocab))
        scale, height = scale_and_height(reachable, student @ weight.T)
        student = scale * student
        student[:, :1] = height
        found = [student]
        for direction in others:
            size = 0 if kind == "identical" else step(kl, student @ weight.T, direction @ weight.T)
            found.append(student + size * direction)
        if kind == "one-hot":  # the teacher is sure
            found[1] = torch.zeros(count, tokens.hidden, dtype=torch.float64)
            found[1][:, 0] = 60
        found[0][:, 1] = offset if kind in ("one offset", "both offset") else 0
        for other in found[1:]:
            other[:, 1] = offset if kind == "both offset" else 0
    names = ("student_hidden", "teacher_hidden", "ref_hidden")
    return dict(zip(names, found, strict=True)) | {"weight": weight}


def weights(draw: st.DrawFn, tokens: Draw) -> Tensor:
    """Positive, or some of them exactly zero, or all."""
    keep = draw(st.sampled_from([1.0, 1.0, 0.6, 0.6, 0.6, 0.6, 0.1, 0.0]))
    return tokens.per_token(0.2, 1) * (tokens.per_token() < keep)


def divergence(draw: st.DrawFn) -> Arguments:
    name = draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd"]))
    if name != "jsd":
        return {"divergence": name}
    beta = draw(st.sampled_from([0.0, 1e-3, 0.3, 0.5, 1 - 1e-3, 1.0]))
    conventions = ["gkd", "scaled"] + ["interior"] * (0 < beta < 1)
    return {
        "divergence": name,
        "jsd_beta": beta,
        "jsd_convention": draw(st.sampled_from(conventions)),
    }


def head_options(draw: st.DrawFn, tokens: Draw, *, identical: bool, difference: bool) -> Arguments:
    """What becomes of products with the head on their way to log-probs."""
    given: Arguments = {}
    if not difference and draw(st.booleans()):
        given["bias"] = tokens.normal(tokens.vocab)
    if draw(st.booleans()):
        given["logit_scale"] = draw(st.sampled_from([0.5, -0.8, 1.25]))
    if not difference and draw(st.booleans()):
        given["logit_softcap"] = draw(st.sampled_from([4.0, 30.0]))
    names = ["temperature"] + ["kl_temperature"] * (not difference)
    names += ["teacher_temperature"] * (not difference and not identical)
    for name in names:
        kind = draw(st.sampled_from(["absent", "absent", "number", "per token"]))
        if kind != "absent":
            given[name] = 0.7 if kind == "number" else tokens.per_token(0.5, 2)
    return given


def own_heads(draw: st.DrawFn, given: Arguments) -> Arguments:
    """Heads of other models: more dimensions, more rows."""
    own: Arguments = {}
    for name in ("teacher", "ref"):
        if f"{name}_hidden" in given and draw(st.integers(0, 3)) == 0:
            own[f"{name}_hidden"] = pad(given[f"{name}_hidden"], (0, 2), value=0.5)
            own[f"{name}_weight"] = pad(given["weight"], (0, 2, 0, 3), value=0.5)
    return own


def terms(draw: st.DrawFn, tokens: Draw) -> Arguments:
    """Terms beside the divergence, and factors of single terms."""
    given: Arguments = {}
    if draw(st.booleans()):
        given |= {
            "advantages": tokens.per_token(-1, 1),
            "old_logprobs": tokens.per_token(-0.5, 0.5),
        }
        given |= {"pg_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        given["entropy_coef"] = draw(st.sampled_from([0.1, -0.1]))
    return given


@st.composite
def cases(draw: st.DrawFn) -> Case:
    columns = draw(st.one_of(st.integers(2, 300), st.sampled_from([1023, 2049, 4097, 5000])))
    most = draw(st.sampled_from(MOST_ROWS))
    rows = draw(st.integers(0, most if columns <= 300 else most // 6))
    hidden = draw(st.sampled_from([3, 5, 9, 17, 33]))
    tokens = Draw((rows,), hidden, columns, seed=draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(KINDS))
    given = sides(
        kind,
        tokens,
        kl=10 ** draw(st.floats(-4, 1)),
        entropy=draw(st.floats(0.1, 8)),
        offset=draw(st.sampled_from([-40.0, 40.0])),
    )
    present = draw(st.sampled_from([("teacher",), ("teacher", "ref"), ("ref",)]))
    for name in {"teacher", "ref"} - set(present):
        del given[f"{name}_hidden"]
    identical = kind == "identical"
    dtype = draw(st.sampled_from(DTYPES))
    difference = dtype == torch.bfloat16 and draw(st.booleans())
    given |= {"precision": "difference"} if difference else {}
    given |= {} if identical or difference else own_heads(draw, given)
    given |= head_options(draw, tokens, identical=identical, difference=difference)
    if draw(st.booleans()):
        given["targets"] = tokens.targets()
        given |= {} if identical else terms(draw, tokens)
    given["token_weights"] = weights(draw, tokens) / max(rows, 1)
    if "teacher" in present:
        given |= divergence(draw)
        given |= {"kl_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
        given |= {"token_kl_cap": 0.5} if draw(st.booleans()) else {}
    else:
        given |= {"teacher_hidden": None}
        given.pop("teacher_temperature", None)
    if "ref" in present:
        given["ref_coef"] = draw(st.sampled_from([0.3, 0.001]))
        given |= {"ref_weights": weights(draw, tokens)} if draw(st.booleans()) else {}
    if draw(st.booleans()):
        given = padded(given, draw(st.integers(1, 9)))
    if draw(st.booleans()):
        given |= {"sparse_tolerance": 1e-6, "sparse_max_columns": columns}
    if draw(st.booleans()):  # nine rows a chunk or more: of three sides and two gradients
        given["max_chunk_bytes"] = 9 * 5 * 4 * columns
    frozen = draw(st.sampled_from([(), (), (), ("weight", "bias"), ("student_hidden",)]))
    upstream = draw(st.sampled_from([1.0, -3.0]))
    return Case(near_the_policy(cast(given, dtype)), frozen, upstream, identical)


def near_the_policy(given: Arguments) -> Arguments:
    """`old_logprobs` are drawn as distances to the policy's log-probs."""
    if "old_logprobs" not in given:
        return given
    names = ("student_hidden", "weight", "bias", "targets", "token_weights", "vocab_size")
    names += ("temperature", "logit_scale", "logit_softcap")
    policy = {name: given[name] for name in names if name in given}
    logprob = truth(policy | {"teacher_hidden": None, "entropy_coef": 1.0}).stats.logprob
    return given | {"old_logprobs": given["old_logprobs"] + logprob.nan_to_num().float()}


def padded(given: Arguments, rows: int) -> Arguments:
    """The same, with rows of the head that must not matter."""
    columns = len(given["weight"])
    worthless = torch.full((rows, given["weight"].shape[1]), 1e30, dtype=torch.float64)
    worthless[0] = torch.nan
    longer = {
        name: torch.cat([given[name], worthless if name == "weight" else worthless[:, 0]])
        for name in ("weight", "bias")
        if name in given
    }
    return given | longer | {"vocab_size": columns}
