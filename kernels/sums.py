"""Sums of the per-chunk partials of a backward kernel: one second launch per operation."""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE


@triton.jit
def sum_rows(at, count, D, block, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum COLS columns over ``count`` contiguous rows of D, in an order that depends only on ``count``."""
    cols = block * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (cols < D)[None, :]
        total += tl.load(at + rows.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def sum_partials_kernel(
    partial, sums, dbias, samples, chunks, groups, D,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
):  # fmt: skip
    """partial: (groups, chunks, D), one group per kind and sample, followed by samples * chunks rows of the bias.

    The bias's sums are the longest, so the first programs compute them, in more and narrower column blocks.
    """
    program = tl.program_id(0).to(tl.int64)
    if HAS_BIAS:
        bias_programs = tl.cdiv(D, BIAS_COLS)
        if program < bias_programs:
            bias_rows = partial + tl.cast(groups, tl.int64) * chunks * D
            sum_rows(bias_rows, samples * chunks, D, program, dbias, BIAS_ROWS, BIAS_COLS)
        program -= bias_programs
    if program >= 0:
        blocks = tl.cdiv(D, COLS)
        group = program // blocks
        sum_rows(partial + group * chunks * D, chunks, D, program % blocks, sums + group * D, ROWS, COLS)


def sum_partials(partial: torch.Tensor, sums: torch.dtype, bias: torch.dtype | None):
    """Sum partial (kinds, B, chunks, D) float32, in an order fixed by its shape.

    Returns:
        (kinds, B, D) in the dtype ``sums``, summed over chunks; without the last kind if ``bias`` is given.
        (D,) in the dtype ``bias``: the last kind, summed over samples as well; None without ``bias``.
    """
    kinds, b, chunks, d = partial.shape
    kinds -= bias is not None
    total = partial.new_empty(kinds, b, d, dtype=sums)
    dbias = None if bias is None else partial.new_empty(d, dtype=bias)
    rows, bias_rows = (min(most, triton.next_power_of_2(max(1, n))) for most, n in ((64, chunks), (256, b * chunks)))
    cols, bias_cols = 128, 16
    programs = kinds * b * triton.cdiv(d, cols) + (0 if bias is None else triton.cdiv(d, bias_cols))
    if programs:
        sum_partials_kernel[(programs,)](
            partial, total, dbias, b, chunks, kinds * b, d,
            HAS_BIAS=bias is not None, ROWS=rows, COLS=cols, BIAS_ROWS=bias_rows, BIAS_COLS=bias_cols,
            num_warps=4, **FUSE,
        )  # fmt: skip
    return total, dbias
