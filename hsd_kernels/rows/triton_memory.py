"""What memory the Triton row kernels can use: rows of one pitch, whole and aligned to 128 bits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hsd_kernels.rows import RowInputs
from hsd_kernels.rows.buffers import PITCH_MULTIPLE
from hsd_kernels.rows.triton_tile import Biases

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape_of(x: RowInputs, biases: Biases) -> tuple[int, int, int]:
    """Rows, columns and pitch of all sides."""
    sides = {"student": x.student, "teacher": x.teacher, "reference": x.reference}
    for name, side in sides.items():
        if side is None:
            continue
        check_rows(name, side)
        if side.shape != x.student.shape or side.stride() != x.student.stride():
            raise ValueError(
                f"{name}: found shape {tuple(side.shape)} and strides {side.stride()}, expected "
                f"the student's, {tuple(x.student.shape)} and {x.student.stride()}"
            )
    for name, bias in biases._asdict().items():
        if bias is not None:
            check_rows(f"bias of the {name}", bias[None])
    rows, columns = x.student.shape
    return rows, columns, x.student.stride(0)


def check_rows(name: str, tensor: Tensor) -> None:
    """What 128-bit accesses to every row need."""
    rows, columns = tensor.shape
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: found {tensor.dtype}, expected float32, bfloat16 or float16")
    whole = triton.cdiv(columns, PITCH_MULTIPLE) * PITCH_MULTIPLE
    end = tensor.storage_offset() + (rows - 1) * tensor.stride(0) + whole
    fits = rows == 0 or end * tensor.element_size() <= tensor.untyped_storage().nbytes()
    aligned = tensor.data_ptr() % 16 == 0 and (rows <= 1 or tensor.stride(0) % PITCH_MULTIPLE == 0)
    if not (fits and aligned and (columns <= 1 or tensor.stride(1) == 1)):
        raise ValueError(
            f"{name}: found strides {tensor.stride()} at byte {tensor.data_ptr() % 16} of 16, "
            f"expected rows of a pitch that is a multiple of {PITCH_MULTIPLE} elements, whole "
            "to the last one, as row_buffer makes them"
        )


def check_overlap(out: Tensor, x: RowInputs) -> None:
    """`out` may be a side's own elements, or memory apart from all of them."""

    def span(tensor: Tensor) -> tuple[int, int]:
        size = tensor.element_size()
        return tensor.data_ptr(), tensor.data_ptr() + tensor.shape[0] * tensor.stride(0) * size

    first, last = span(out)
    for name, side in (("student", x.student), ("teacher", x.teacher), ("reference", x.reference)):
        if side is None or not (first < span(side)[1] and span(side)[0] < last):
            continue
        if (
            first != side.data_ptr()
            or out.stride() != side.stride()
            or (out.element_size() != side.element_size())
        ):
            raise ValueError(
                f"out: found memory of the {name} with another layout or element size, expected "
                "the same elements or memory of its own"
            )
