"""The row kernels in Triton: the contract of `hsd_kernels.rows`, launched.

A row is cut into tiles of `TILE` columns, and every tile is a part of its own: statistics do not
depend, to the bit, on how tiles are distributed over programs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from hsd_kernels.rows import RowInputs, RowSpec, Source, known_difference
from hsd_kernels.rows.partials import Partial
from hsd_kernels.rows.triton_errors import column_error_kernel
from hsd_kernels.rows.triton_gradient import column_mass_kernel, gradient_kernel
from hsd_kernels.rows.triton_memory import check_overlap, check_rows, shape_of
from hsd_kernels.rows.triton_merge import merge_kernel
from hsd_kernels.rows.triton_statistics import mixture_kernel, partials_kernel
from hsd_kernels.rows.triton_tile import Biases, Known
from hsd_kernels.statistics import Coefficients

TILE = 2048  # columns
_THREADS = TILE // 8  # of a program: each has 8 columns of a side, which are 128 bits of bf16
MERGED = 512  # tiles times rows that one program merges
_REGISTERS = 65_536  # of an NVIDIA multiprocessor
_ROW_BLOCK = 128  # rows of one sum of column masses
_ERROR_ROWS, _ERROR_WIDTH = 32, 1024  # and columns, of one sum of column errors
_NO_BIASES = Biases()


def row_partials(
    spec: RowSpec,
    x: RowInputs,
    *,
    biases: Biases = _NO_BIASES,
    first_column: int = 0,
    tiles_per_program: int = 1,
) -> Tensor:
    """Statistics of each tile of a row, (tiles, len(Partial), C) fp32, see `Partial`.

    Args:
        x: sides (C, V) fp32, bf16 or fp16, of one pitch, see `row_buffer`.
        biases: to be added to raw logits; None where the GEMM has, or where there is none.
        first_column: the column of the vocabulary that is column 0 here.
        tiles_per_program: the distribution of tiles over programs; the result is the same.

    Raises:
        ValueError: where a tensor's strides or dtype do not suit the kernels.
    """
    rows, columns, pitch = shape_of(x, biases)
    tiles = max(triton.cdiv(columns, TILE), 1)
    parts = x.student.new_empty((tiles, len(Partial), rows), dtype=torch.float32)
    if rows:
        launch(
            partials_kernel, (rows, triton.cdiv(tiles, tiles_per_program)),
            x, biases, parts, rows, columns, pitch, tiles, first_column,
            SPEC=_first_reading(spec), KNOWN=_known(spec), TILE=TILE, RUN=tiles_per_program,
            **_resources(spec, _THREADS),
        )  # fmt: skip
    return parts


def merge_tiles(spec: RowSpec, parts: Tensor) -> Tensor:
    """`partials.merge` in one launch: it takes some 130 to 300, as it would once per chunk.

    Args:
        parts: (tiles, len(Partial), C) fp32, contiguous, of tiles that all have columns.

    Returns:
        One part, (1, len(Partial), C) fp32.
    """
    tiles, _, rows = parts.shape
    if tiles == 1 or not rows:
        return parts[:1]
    whole = torch.full_like(parts[:1], torch.nan)
    padded = triton.next_power_of_2(tiles)
    block = max(MERGED // padded, 1)
    launch(
        merge_kernel, (triton.cdiv(rows, block), 1),
        parts, whole, rows, tiles,
        SPEC=_of_parts(spec), KNOWN=_known(spec), TILES=padded, BLOCK=block,
        **_resources(spec, _THREADS),
    )  # fmt: skip
    return whole


def row_mixture(
    spec: RowSpec,
    x: RowInputs,
    rows: Tensor,
    *,
    biases: Biases = _NO_BIASES,
    tiles_per_program: int = 1,
) -> Tensor:
    """The sums of `mixture.mixture_sums` over each tile, (tiles, 3, C) fp32.

    Args:
        rows: (len(Row), C) fp32, what `partials.finish` made of the rows' parts.
    """
    count, columns, pitch = shape_of(x, biases)
    # One kernel for all that differs in what it does not read.
    spec = replace(spec, reference="absent", forward_kl=False, reverse_kl=False, target=False)
    x, biases = x._replace(reference=None, targets=None), biases._replace(reference=None)
    tiles = max(triton.cdiv(columns, TILE), 1)
    sums = x.student.new_empty((tiles, 3, count), dtype=torch.float32)
    if count:
        launch(
            mixture_kernel, (count, triton.cdiv(tiles, tiles_per_program)),
            x, biases, rows.contiguous(), sums, count, columns, pitch, tiles,
            SPEC=spec, KNOWN=_known(spec), TILE=TILE, RUN=tiles_per_program,
            **_resources(spec, _THREADS),
        )  # fmt: skip
    return sums


def row_grad(
    spec: RowSpec,
    x: RowInputs,
    rows: Tensor,
    coefficients: Coefficients,
    out: Tensor,
    *,
    biases: Biases = _NO_BIASES,
    tiles_per_program: int = 1,
) -> Tensor:
    """Writes dL/d(raw logits) to `out`, (C, V); returns its L1 mass per row before rounding, (C,).

    Args:
        rows: (len(Row), C) fp32 statistics.
        out: fp32, bf16 or fp16 with the pitch of `row_buffer`, rounded to nearest even. It may be
            `x.student`, or memory of it that is viewed as another dtype of the same size.

    Raises:
        ValueError: where a tensor's strides or dtype do not suit the kernels, or where `out`
            overlaps an input otherwise: other programs would still have to read it.
    """
    count, columns, pitch = shape_of(x, biases)
    if out.shape != x.student.shape:
        raise ValueError(f"out: found shape {tuple(out.shape)}, expected {(count, columns)}")
    check_rows("out", out)
    check_overlap(out, x)
    spec, x, biases = _read_by_gradient(spec, x, biases)
    tiles = max(triton.cdiv(columns, TILE), 1)
    masses = x.student.new_empty((tiles, count), dtype=torch.float32)
    if count:
        launch(
            gradient_kernel, (count, triton.cdiv(tiles, tiles_per_program)),
            x, biases, rows.contiguous(), Coefficients(*(c.contiguous() for c in coefficients)),
            out, masses, count, columns, pitch, out.stride(0), tiles,
            SPEC=spec, KNOWN=_known(spec), TILE=TILE, RUN=tiles_per_program,
            **_resources(spec, _THREADS),
        )  # fmt: skip
    return masses.sum(0)


def row_errors(spec: RowSpec, x: RowInputs, rows: Tensor, coefficients: Coefficients) -> Tensor:
    """`torch_errors.row_errors`, (3, V) fp32: sums over blocks of rows, then of these."""
    count, columns, pitch = shape_of(x, _NO_BIASES)
    spec, x, _ = _read_by_gradient(spec, x, _NO_BIASES)
    blocks = max(triton.cdiv(count, _ERROR_ROWS), 1)
    sums = x.student.new_zeros((blocks, 3, columns), dtype=torch.float32)
    if count:
        launch(
            column_error_kernel, (blocks, max(triton.cdiv(columns, _ERROR_WIDTH), 1)),
            x, _NO_BIASES, rows.contiguous(), Coefficients(*(c.contiguous() for c in coefficients)),
            sums, count, columns, pitch, torch.finfo(x.student.dtype).eps,
            SPEC=spec, KNOWN=_known(spec), BLOCK=_ERROR_ROWS, WIDTH=_ERROR_WIDTH,
            **_resources(spec, _ERROR_WIDTH // 8),
        )  # fmt: skip
    return sums.sum(0)


def masses(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """sum |gradient| (C, V) of each column, (V,) fp32, over blocks of rows; of each row, (C,)."""
    check_rows("gradient", gradient)
    rows, columns = gradient.shape
    blocks = gradient.new_empty((triton.cdiv(rows, _ROW_BLOCK), columns), dtype=torch.float32)
    if blocks.numel():
        step, width = 8, 512
        launch(
            column_mass_kernel, (len(blocks), triton.cdiv(columns, width)),
            gradient, blocks, rows, columns, gradient.stride(0),
            BLOCK=_ROW_BLOCK, STEP=step, WIDTH=width, num_warps=4,
        )  # fmt: skip
    of_rows = torch.linalg.vector_norm(gradient, ord=1, dim=-1, dtype=torch.float32)
    return blocks.sum(0), of_rows


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **options: Any) -> None:
    """Every launch goes through here, where a tool can see what would be compiled."""
    kernel[grid](*arguments, **options)


def _resources(spec: RowSpec, threads: int) -> dict[str, int]:
    """Warps of a program and, on NVIDIA, a limit of registers: two programs fit a multiprocessor.

    One where a row has three sides, which may need more than 128 registers of a thread of 256.
    Given no limit, ptxas spills a few bytes here and there to fit one more program.
    """
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    warps = {"num_warps": threads // target.warp_size}
    if target.backend != "cuda":
        return warps
    programs = 1 if "absent" not in (spec.teacher, spec.reference) else 2
    return warps | {"maxnreg": min(_REGISTERS // (programs * threads), 255)}


def _first_reading(spec: RowSpec) -> RowSpec:
    """The jsd takes the sums of both divergences: no kernel of its own for the same."""
    return replace(spec, forward_kl=True, reverse_kl=True, jsd=False) if spec.jsd else spec


def _of_parts(spec: RowSpec) -> RowSpec:
    """What of a specification is left to see in statistics, beside known differences."""

    def present(source: Source) -> Source:
        return "absent" if source == "absent" else "logits"

    return replace(
        _first_reading(spec),
        teacher=present(spec.teacher),
        reference=present(spec.reference),
        softcap=False,
        same_temperature=True,
    )


def _read_by_gradient(
    spec: RowSpec, x: RowInputs, biases: Biases
) -> tuple[RowSpec, RowInputs, Biases]:
    """Without a teacher that no term has: no kernel of its own for what it does not read."""
    if spec.forward_kl or spec.reverse_kl or spec.jsd:
        return spec, x, biases
    spec = replace(spec, teacher="absent", same_temperature=True)
    return spec, x._replace(teacher=None), biases._replace(teacher=None)


def _known(spec: RowSpec) -> Known:
    return Known(
        teacher=known_difference(spec, spec.teacher, of_teacher=True),
        reference=known_difference(spec, spec.reference, of_teacher=False),
    )
