"""Backward of GELU (tanh) between the two GEMMs of the MLP; contract: ditfast/ops/mlp.py."""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE, sum_partials


@triton.jit
def backward_kernel(
    dact, pre, act, partial, M,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, KEEP_ACT: tl.constexpr,
):  # fmt: skip
    """dact becomes the gradient before GELU, in place; act is written where KEEP_ACT."""
    blocks = tl.cdiv(F, COLS)
    program = tl.program_id(0).to(tl.int64)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    first = program // blocks * CHUNK
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(first, first + CHUNK, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & (cols < F)[None, :]
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dact + at, mask=mask, other=0.0).to(tl.float32)
        # gelu(x) = x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3): no cancellation for negative x
        e = tl.minimum(tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)), 1e37)
        gate = 1.0 / (1.0 + e)  # and 1 - gate is e * gate, without cancellation
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        dx = dy * gate * (1.0 + x * e * gate * slope)
        tl.store(dact + at, dx.to(dact.dtype.element_ty), mask=mask)
        if KEEP_ACT:
            tl.store(act + at, (x * gate).to(act.dtype.element_ty), mask=mask)
        total += dx
    tl.store(partial + program // blocks * F + cols, tl.sum(total, 0), mask=cols < F)


def backward_(dact, pre, keep_act: bool, bias_dtype):
    """Overwrite dact (M, F) with the gradient before GELU; also act (M, F), if kept, and dbias (F,)."""
    m, f = pre.shape
    chunk = 64 if m >= 8192 else 16
    chunks = triton.cdiv(m, chunk)
    act = pre.new_empty(pre.shape) if keep_act else None
    partial = pre.new_empty(chunks, f, dtype=torch.float32)
    if m:
        backward_kernel[(chunks * triton.cdiv(f, 512),)](
            dact, pre, act, partial, m,
            F=f, ROWS=4, COLS=512, CHUNK=chunk, KEEP_ACT=keep_act, num_warps=4, **FUSE,
        )  # fmt: skip
    return act, sum_partials(partial.unsqueeze(0), bias_dtype)[0]
