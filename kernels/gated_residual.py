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
    store_row,
    zero_row,
)
from ditfast.kernels.strides import unit_stride
from ditfast.kernels.sums import sum_partials


@triton.jit(do_not_specialize=["chunk"])
def forward_kernel(
    x, y, gate, bias, out, N, chunk,
    x_b, x_n, y_b, y_n, gate_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    bias0, bias1 = load_row(bias, D, MAIN, TAIL) if HAS_BIAS else zero_row(MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        x0, x1 = x0 + gate0 * (y0 + bias0), x1 + gate1 * (y1 + bias1)
        store_row(out + (b * N + n) * D, x0, x1, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dout, y, gate, bias, dy, partial, N, chunk,
    dout_b, dout_n, y_b, y_n, gate_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    dgate0, dgate1 = zero_row(MAIN, TAIL)
    sum0, sum1 = zero_row(MAIN, TAIL)  # of dout
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        dout0, dout1 = load_row(dout + b * dout_b + n * dout_n, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        store_row(dy + (b * N + n) * D, dout0 * gate0, dout1 * gate1, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + dout0 * y0, dgate1 + dout1 * y1
        if HAS_BIAS:
            sum0, sum1 = sum0 + dout0, sum1 + dout1
    partial += program * D  # (1 or 2, B, chunks, D): dgate, dbias
    if HAS_BIAS:  # what it adds to y is the same for every token
        bias0, bias1 = load_row(bias, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + bias0 * sum0, dgate1 + bias1 * sum1
        dbias = partial + tl.num_programs(0).to(tl.int64) * D
        store_row(dbias, sum0 * gate0, sum1 * gate1, D, MAIN, TAIL)
    store_row(partial, dgate0, dgate1, D, MAIN, TAIL)


def forward(x, y, gate, bias):
    """(B, N, D) in the dtype of x."""
    b, n, d = x.shape
    x, y, gate = unit_stride(x), unit_stride(y), unit_stride(gate)
    bias = None if bias is None else unit_stride(bias)
    out = x.new_empty(x.shape)
    if x.numel():
        chunk, options = forward_options(b, n, d, loads=2)
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
    chunk, options = backward_options(b, n, d, loads=2)
    chunks = triton.cdiv(n, chunk)
    dy = y.new_empty(y.shape)
    partial = y.new_empty(1 if bias is None else 2, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dout, y, gate, bias, dy, partial, n, chunk,
            *dout.stride()[:2], *y.stride()[:2], gate.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    (dgate,), dbias = sum_partials(partial, gate.dtype, None if bias is None else bias.dtype)
    return dy, dgate, gate.new_empty(0) if bias is None else dbias
