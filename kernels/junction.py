"""x_new = x + gate * (y + bias), h = LN(x_new) * (1 + scale) + shift; contract: ditfast/ops/junction.py.

Names of strides (x_b, x_n): kernels/strides.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import (
    backward_options,
    centre,
    forward_options,
    layer_norm_grad,
    load_row,
    locate,
    normalize,
    store_row,
    zero_row,
)
from ditfast.kernels.strides import unit_stride
from ditfast.kernels.sums import sum_partials


@triton.jit(do_not_specialize=["chunk"])
def forward_kernel(
    x, y, gate, shift, scale, bias, x_new, h, mean, rstd, N, chunk, eps,
    x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    shift0, shift1 = load_row(shift + b * shift_b, D, MAIN, TAIL)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    bias0, bias1 = load_row(bias, D, MAIN, TAIL) if HAS_BIAS else zero_row(MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        x0, x1 = x0 + gate0 * (y0 + bias0), x1 + gate1 * (y1 + bias1)
        # LN reads what the next kernel will read: x_new as stored
        x0, x1 = x0.to(x_new.dtype.element_ty).to(tl.float32), x1.to(x_new.dtype.element_ty).to(tl.float32)
        row = b * N + n
        store_row(x_new + row * D, x0, x1, D, MAIN, TAIL)
        mu, r, x0, x1 = normalize(x0, x1, eps, D, MAIN, TAIL)
        store_row(h + row * D, x0 * r * scale0 + shift0, x1 * r * scale1 + shift1, D, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, dx, dy, partial, N, chunk,
    dx_new_b, dx_new_n, dh_b, dh_n, y_b, y_n, gate_b, scale_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    dgate0, dgate1 = zero_row(MAIN, TAIL)
    dshift0, dshift1 = zero_row(MAIN, TAIL)
    dscale0, dscale1 = zero_row(MAIN, TAIL)
    sum0, sum1 = zero_row(MAIN, TAIL)  # of dx
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        row = b * N + n
        dh0, dh1 = load_row(dh + b * dh_b + n * dh_n, D, MAIN, TAIL)
        x0, x1 = load_row(x_new + row * D, D, MAIN, TAIL)
        r = tl.load(rstd + row)
        x0, x1 = centre(x0, x1, tl.load(mean + row), D, MAIN, TAIL)
        xhat0, xhat1 = x0 * r, x1 * r
        dshift0, dshift1 = dshift0 + dh0, dshift1 + dh1
        dscale0, dscale1 = dscale0 + dh0 * xhat0, dscale1 + dh1 * xhat1
        through0, through1 = layer_norm_grad(dh0, dh1, xhat0, xhat1, scale0, scale1, r, D, TAIL)
        dx0, dx1 = load_row(dx_new + b * dx_new_b + n * dx_new_n, D, MAIN, TAIL)
        dx0, dx1 = dx0 + through0, dx1 + through1
        store_row(dx + row * D, dx0, dx1, D, MAIN, TAIL)
        store_row(dy + row * D, dx0 * gate0, dx1 * gate1, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + dx0 * y0, dgate1 + dx1 * y1
        if HAS_BIAS:
            sum0, sum1 = sum0 + dx0, sum1 + dx1
    partial += program * D  # (3 or 4, B, chunks, D): dgate, dshift, dscale, dbias
    kind = tl.num_programs(0).to(tl.int64) * D
    if HAS_BIAS:  # what it adds to y is the same for every token
        bias0, bias1 = load_row(bias, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + bias0 * sum0, dgate1 + bias1 * sum1
        store_row(partial + 3 * kind, sum0 * gate0, sum1 * gate1, D, MAIN, TAIL)
    store_row(partial, dgate0, dgate1, D, MAIN, TAIL)
    store_row(partial + kind, dshift0, dshift1, D, MAIN, TAIL)
    store_row(partial + 2 * kind, dscale0, dscale1, D, MAIN, TAIL)


def forward(x, y, gate, shift, scale, eps, bias, out_dtype):
    """x_new, h (B, N, D); mean and rstd of x_new (B, N) float32."""
    b, n, d = x.shape
    x, y, gate, shift, scale = (unit_stride(t) for t in (x, y, gate, shift, scale))
    bias = None if bias is None else unit_stride(bias)
    x_new, h = x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = forward_options(b, n, d, loads=2)
        forward_kernel[(b * triton.cdiv(n, chunk),)](
            x, y, gate, shift, scale, bias, x_new, h, mean, rstd, n, chunk, eps,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    return x_new, h, mean, rstd


def backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd):
    """dx, dy (B, N, D); (3, B, D): dgate, dshift, dscale; dbias (D,), empty without a bias."""
    b, n, d = x_new.shape
    dx_new, dh, y, gate, scale = (unit_stride(t) for t in (dx_new, dh, y, gate, scale))
    bias = None if bias is None else unit_stride(bias)
    chunk, options = backward_options(b, n, d, loads=4)
    chunks = triton.cdiv(n, chunk)
    dx, dy = x_new.new_empty(x_new.shape), y.new_empty(y.shape)
    partial = y.new_empty(3 if bias is None else 4, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, dx, dy, partial, n, chunk,
            *dx_new.stride()[:2], *dh.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    modulation, dbias = sum_partials(partial, scale.dtype, None if bias is None else bias.dtype)
    return dx, dy, modulation, gate.new_empty(0) if bias is None else dbias
