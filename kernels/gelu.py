"""Backward of GELU (tanh) between the two GEMMs of the MLP; contract: ditfast/ops/mlp.py.

gelu(x) = x * sigmoid(z) with z = 2 * sqrt(2/pi) * (x + CUBIC * x^3), which does not cancel for negative x as
1 + tanh does.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE
from ditfast.kernels.sums import sum_partials

SLOPE_AT_ZERO = tl.constexpr(1.5957691216057308)  # dz/dx there: 2 * sqrt(2/pi)
CUBIC = tl.constexpr(0.044715)
CUBIC_OF_SLOPE = tl.constexpr(0.134145)  # 3 * CUBIC
LARGE = tl.constexpr(1e37)  # where exp(-z) is cut: infinity times a sigmoid of zero would be NaN


@triton.jit
def backward_kernel(
    dact, pre, act, partial, M,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, KEEP_ACT: tl.constexpr,
):  # fmt: skip
    """dact (M, F) becomes the gradient before GELU, in place; act (M, F) is written where KEEP_ACT."""
    blocks = tl.cdiv(F, COLS)
    program = tl.program_id(0).to(tl.int64)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    first = program // blocks * CHUNK
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, first + CHUNK, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & (cols < F)[None, :]
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)  # (ROWS, COLS)
        dgelu = tl.load(dact + at, mask=mask, other=0.0).to(tl.float32)
        e = tl.minimum(tl.exp(x * (1.0 + x * x * CUBIC) * -SLOPE_AT_ZERO), LARGE)  # exp(-z)
        sigmoid = 1.0 / (1.0 + e)
        rest = e * sigmoid  # 1 - sigmoid, without cancellation
        slope = (1.0 + x * x * CUBIC_OF_SLOPE) * SLOPE_AT_ZERO  # dz/dx
        dpre = dgelu * sigmoid * (1.0 + rest * (x * slope))
        tl.store(dact + at, dpre.to(dact.dtype.element_ty), mask=mask)
        if KEEP_ACT:
            tl.store(act + at, (x * sigmoid).to(act.dtype.element_ty), mask=mask)
        total += dpre
    tl.store(partial + program // blocks * F + cols, tl.sum(total, 0), mask=cols < F)


def backward_(dact, pre, keep_act: bool, bias_dtype):
    """Overwrite dact (M, F) with the gradient before GELU; also act (M, F), if kept, and dbias (F,)."""
    m, f = pre.shape
    chunk = 64 if m >= 8192 else 16
    chunks = triton.cdiv(m, chunk)
    act = pre.new_empty(pre.shape) if keep_act else None
    partial = pre.new_empty(1, 1, chunks, f, dtype=torch.float32)
    if m:
        backward_kernel[(chunks * triton.cdiv(f, 512),)](
            dact, pre, act, partial, m,
            F=f, ROWS=4, COLS=512, CHUNK=chunk, KEEP_ACT=keep_act, num_warps=4, **FUSE,
        )  # fmt: skip
    return act, sum_partials(partial, torch.float32, bias_dtype)[1]
