"""x + gate * (y + bias); contract: ditfast/ops/gated_residual.py.

Names of strides (x_b, x_n): kernels/strides.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import (
    backward_options,
    forward_options,
    load_row,
    locate,
    sum_partials,
)
from ditfast.kernels.strides import unit_stride


@triton.jit(do_not_specialize=["chunk"])
def forward_kernel(
    x, y, gate, bias, out, N, chunk,
    x_b, x_n, y_b, y_n, gate_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    gate_row = load_row(gate + b * gate_b, cols, mask)  # (D,)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        y_row = load_row(y + b * y_b + n * y_n, cols, mask)
        if HAS_BIAS:
            y_row += load_row(bias, cols, mask)
        out_row = load_row(x + b * x_b + n * x_n, cols, mask) + gate_row * y_row
        tl.store(out + (b * N + n) * D + cols, out_row.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dout, y, gate, bias, dy, partial, N, chunk,
    dout_b, dout_n, y_b, y_n, gate_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    gate_row = load_row(gate + b * gate_b, cols, mask)  # (D,)
    dgate = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        dout_row = load_row(dout + b * dout_b + n * dout_n, cols, mask)
        y_row = load_row(y + b * y_b + n * y_n, cols, mask)
        if HAS_BIAS:
            y_row += load_row(bias, cols, mask)
        dy_row = dout_row * gate_row
        tl.store(dy + (b * N + n) * D + cols, dy_row.to(dy.dtype.element_ty), mask=mask)
        dgate += dout_row * y_row
        dbias += dy_row
    partial += program * D + cols  # (1 or 2, B, chunks, D): dgate, dbias
    tl.store(partial, dgate, mask=mask)
    if HAS_BIAS:
        tl.store(partial + tl.num_programs(0).to(tl.int64) * D, dbias, mask=mask)


def forward(x, y, gate, bias):
    """(B, N, D) in the dtype of x."""
    b, n, d = x.shape
    x, y, gate = unit_stride(x), unit_stride(y), unit_stride(gate)
    bias = None if bias is None else unit_stride(bias)
    out = x.new_empty(x.shape)
    if x.numel():
        chunk, options = forward_options(b, n, d)
        forward_kernel[(b * triton.cdiv(n, chunk),)](
            x, y, gate, bias, out, n, chunk,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    return out


def backward(dout, y, gate, bias):
    """dy (B, N, D), dgate (B, D), dbias (D,), empty without a bias."""
    b, n, d = y.shape
    dout, y, gate = unit_stride(dout), unit_stride(y), unit_stride(gate)
    bias = None if bias is None else unit_stride(bias)
    chunk, options = backward_options(b, n, d, dout.dtype)
    chunks = triton.cdiv(n, chunk)
    dy = y.new_empty(y.shape)
    partial = y.new_empty(1 if bias is None else 2, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dout, y, gate, bias, dy, partial, n, chunk,
            *dout.stride()[:2], *y.stride()[:2], gate.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    dgate = sum_partials(partial[0], gate.dtype)
    if bias is None:
        return dy, dgate, gate.new_empty(0)
    dbias = sum_partials(partial[1].reshape(1, b * chunks, d), bias.dtype)[0]
    return dy, dgate, dbias
