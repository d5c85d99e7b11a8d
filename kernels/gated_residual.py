"""x + gate * (y + bias); contract: ditfast/ops/gated_residual.py.

Names of strides (x_b, x_n): kernels/strides.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import (
    backward_options,
    forward_options,
    jvp_options,
    load_optional_row,
    load_row,
    locate,
    store_row,
    zero_row,
)
from ditfast.kernels.strides import leading_strides, unit_stride
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
    if HAS_BIAS:  # the bias is the same for every token
        bias0, bias1 = load_row(bias, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + bias0 * sum0, dgate1 + bias1 * sum1
        dbias = partial + tl.num_programs(0).to(tl.int64) * D
        store_row(dbias, sum0 * gate0, sum1 * gate1, D, MAIN, TAIL)
    store_row(partial, dgate0, dgate1, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["chunk"])
def jvp_kernel(
    x, y, gate, bias, x_t, y_t, gate_t, bias_t, out, out_t, N, chunk,
    x_b, x_n, y_b, y_n, gate_b, x_t_b, x_t_n, y_t_b, y_t_n, gate_t_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The bias and each tangent may be None, meaning zero."""
    _, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    bias0, bias1 = load_optional_row(bias, 0, D, MAIN, TAIL)
    gate_t0, gate_t1 = load_optional_row(gate_t, b * gate_t_b, D, MAIN, TAIL)
    bias_t0, bias_t1 = load_optional_row(bias_t, 0, D, MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        x_t0, x_t1 = load_optional_row(x_t, b * x_t_b + n * x_t_n, D, MAIN, TAIL)
        y_t0, y_t1 = load_optional_row(y_t, b * y_t_b + n * y_t_n, D, MAIN, TAIL)
        y0, y1, y_t0, y_t1 = y0 + bias0, y1 + bias1, y_t0 + bias_t0, y_t1 + bias_t1
        x0, x1 = x0 + gate0 * y0, x1 + gate1 * y1
        x_t0, x_t1 = x_t0 + gate0 * y_t0 + gate_t0 * y0, x_t1 + gate1 * y_t1 + gate_t1 * y1
        row = b * N + n
        store_row(out + row * D, x0, x1, D, MAIN, TAIL)
        store_row(out_t + row * D, x_t0, x_t1, D, MAIN, TAIL)


def forward(x, y, gate, bias):
    """(B, N, D) in the dtype of x."""
    b, n, d = x.shape
    x, y, gate, bias = (unit_stride(t) for t in (x, y, gate, bias))
    out = x.new_empty(*x.shape)
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
    dout, y, gate, bias = (unit_stride(t) for t in (dout, y, gate, bias))
    chunk, options = backward_options(b, n, d, loads=2)
    chunks = triton.cdiv(n, chunk)
    dy = y.new_empty(*y.shape)
    partial = y.new_empty(1 if bias is None else 2, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dout, y, gate, bias, dy, partial, n, chunk,
            *dout.stride()[:2], *y.stride()[:2], gate.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    (dgate,), dbias = sum_partials(partial, gate.dtype, None if bias is None else bias.dtype)
    return dy, dgate, gate.new_empty(0) if bias is None else dbias


def jvp(x, y, gate, bias, x_t, y_t, gate_t, bias_t):
    """The output of `forward` and its tangent, in the same dtype.

    x_t, y_t, gate_t and bias_t are the tangents of x, y, gate and bias, None for zero.
    """
    b, n, d = x.shape
    x, y, gate, bias = (unit_stride(t) for t in (x, y, gate, bias))
    x_t, y_t, gate_t, bias_t = (unit_stride(t) for t in (x_t, y_t, gate_t, bias_t))
    out, out_t = x.new_empty(*x.shape), x.new_empty(*x.shape)
    if x.numel():
        chunk, options = jvp_options(b, n, d, loads=2 + (x_t is not None) + (y_t is not None))
        jvp_kernel[(b * triton.cdiv(n, chunk),)](
            x, y, gate, bias, x_t, y_t, gate_t, bias_t, out, out_t, n, chunk,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0),
            *leading_strides(x_t, 2), *leading_strides(y_t, 2), *leading_strides(gate_t, 1),
            **options,
        )  # fmt: skip
    return out, out_t
