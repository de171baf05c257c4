"""The k most likely tokens of student and teacher, beside the statistics of a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hsd_kernels.problem import Problem
from hsd_kernels.rows import RowInputs, RowSpec
from hsd_kernels.rows.torch_logits import chunk_logits, row_blocks


class TopK(NamedTuple):
    """Token ids and log-probs, most likely first; -1 and 0 in rows that were not computed."""

    ids: Tensor  # (2, N, k) int64: student's, teacher's
    logprobs: Tensor  # (2, N, k)

    @staticmethod
    def empty(problem: Problem) -> TopK:
        shape, device = (2, len(problem.student), problem.settings.top_k), problem.student.device
        return TopK(
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=problem.compute_dtype, device=device),
        )


def most_likely(
    top: TopK,
    rows: Tensor,
    student: tuple[RowSpec, RowInputs],
    teacher: tuple[RowSpec, RowInputs],
    statistics: Mapping[str, Tensor],
) -> None:
    """Fills in the rows of one chunk.

    Args:
        top: of all rows.
        rows: (C,) int64, the chunk's.
        student: the reading at the log-probs' temperature.
        teacher: the reading that has the teacher, if any has.
        statistics: the chunk's, (C,) each.
    """
    k = top.ids.shape[-1]
    for i, (spec, x), lse in ((0, student, "lse"), (1, teacher, "teacher_lse")):
        if i == 1 and spec.teacher == "absent":
            continue
        for block, part in row_blocks(x):
            logits = chunk_logits(spec, part)[i]
            if logits is None:
                raise RuntimeError("a row without a teacher was asked for its top tokens")
            found = logits.topk(k, dim=-1)
            top.ids[i, rows[block]] = found.indices
            top.logprobs[i, rows[block]] = found.values - statistics[lse][block][:, None]
