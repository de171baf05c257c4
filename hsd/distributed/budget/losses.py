"""What a trainer has without the fused loss: the baselines of `hsd budget --compare`.

They take the arguments of `fused_hsd_loss` that `hsd.objective.step` gives it and run forward KL
and reference KL in plain PyTorch; the simulation reads nothing but their memory.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from torch.utils.checkpoint import checkpoint

CHUNK_ROWS = 1024


def naive_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    **arguments: Any,
) -> Any:
    """Log-softmaxes over N x V, float32 logits, all sides at once.

    Args:
        student_hidden: (N, D).
        teacher_hidden: (N, D) or None.
        weight: (V, D).
    """
    return _output(_rows(student_hidden, teacher_hidden, weight, arguments), arguments)


def chunk_loop_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    **arguments: Any,
) -> Any:
    """The same, checkpointed by chunks of rows: backward computes each chunk's logits again.

    Args:
        student_hidden: (N, D).
        teacher_hidden: (N, D) or None.
        weight: (V, D).
    """
    count = len(student_hidden)
    parts = []
    for start in range(0, count, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        per_row = {
            key: value[rows]
            for key, value in arguments.items()
            if isinstance(value, Tensor) and value.shape[:1] == (count,)
        }
        parts.append(
            checkpoint(
                _rows,
                student_hidden[rows],
                None if teacher_hidden is None else teacher_hidden[rows],
                weight,
                {**arguments, **per_row},
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return _output(torch.cat(parts, dim=1), arguments)


def _rows(
    student_hidden: Tensor, teacher_hidden: Tensor | None, weight: Tensor, a: dict[str, Any]
) -> Tensor:
    """(4, N): KL, reference KL, log-prob of the target, entropy."""
    student = log_softmax(linear(student_hidden, weight).float(), -1)
    kl = ref_kl = torch.zeros_like(student[:, 0])
    if teacher_hidden is not None:
        own = a.get("teacher_weight")
        with torch.no_grad():
            head = weight if own is None else own
            teacher = log_softmax(linear(teacher_hidden, head).float(), -1)
        kl = (teacher.exp() * (teacher - student)).sum(-1)
    if a.get("ref_hidden") is not None:
        with torch.no_grad():
            reference = log_softmax(linear(a["ref_hidden"], a["ref_weight"]).float(), -1)
        ref_kl = (student.exp() * (student - reference)).sum(-1)
    entropy = -(student.detach().exp() * student.detach()).sum(-1)
    logprob = student.gather(-1, a["targets"][:, None])[:, 0]
    return torch.stack([kl, ref_kl, logprob, entropy])


def _output(rows: Tensor, a: dict[str, Any]) -> Any:
    """What the step reads of a LossOutput; rows is (4, N)."""
    kl, ref_kl, logprob, entropy = rows
    loss = (a["token_weights"] * (kl + a.get("ref_coef", 0.0) * ref_kl)).sum()
    stats = SimpleNamespace(
        kl=kl.detach(),
        ref_kl=ref_kl.detach(),
        logprob=logprob.detach(),
        entropy=entropy.detach(),
        top1_agree=torch.ones_like(kl),
        computed=a["token_weights"] != 0,
        **dict.fromkeys(("gradient_mass", "dropped_mass", "kept_columns")),
    )
    return SimpleNamespace(loss=loss, stats=stats)
