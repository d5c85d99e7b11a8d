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
    jvp_options,
    layer_norm_grad,
    layer_norm_tangent,
    load_optional_row,
    load_row,
    locate,
    normalize,
    store_row,
    zero_row,
)
from ditfast.kernels.strides import leading_strides, unit_stride
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
        # LN reads x_new as stored, like the next kernel
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
    if HAS_BIAS:  # the bias is the same for every token
        bias0, bias1 = load_row(bias, D, MAIN, TAIL)
        dgate0, dgate1 = dgate0 + bias0 * sum0, dgate1 + bias1 * sum1
        store_row(partial + 3 * kind, sum0 * gate0, sum1 * gate1, D, MAIN, TAIL)
    store_row(partial, dgate0, dgate1, D, MAIN, TAIL)
    store_row(partial + kind, dshift0, dshift1, D, MAIN, TAIL)
    store_row(partial + 2 * kind, dscale0, dscale1, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["chunk"])
def jvp_kernel(
    x, y, gate, shift, scale, bias, x_t, y_t, gate_t, shift_t, scale_t, bias_t,
    x_new, h, mean, rstd, x_new_t, h_t, N, chunk, eps,
    x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b, x_t_b, x_t_n, y_t_b, y_t_n, gate_t_b, shift_t_b, scale_t_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The bias and each tangent may be None, meaning zero."""
    _, b, first = locate(N, chunk)
    gate0, gate1 = load_row(gate + b * gate_b, D, MAIN, TAIL)
    shift0, shift1 = load_row(shift + b * shift_b, D, MAIN, TAIL)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    bias0, bias1 = load_optional_row(bias, 0, D, MAIN, TAIL)
    gate_t0, gate_t1 = load_optional_row(gate_t, b * gate_t_b, D, MAIN, TAIL)
    shift_t0, shift_t1 = load_optional_row(shift_t, b * shift_t_b, D, MAIN, TAIL)
    scale_t0, scale_t1 = load_optional_row(scale_t, b * scale_t_b, D, MAIN, TAIL)
    bias_t0, bias_t1 = load_optional_row(bias_t, 0, D, MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        row = b * N + n
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        y0, y1 = load_row(y + b * y_b + n * y_n, D, MAIN, TAIL)
        x_t0, x_t1 = load_optional_row(x_t, b * x_t_b + n * x_t_n, D, MAIN, TAIL)
        y_t0, y_t1 = load_optional_row(y_t, b * y_t_b + n * y_t_n, D, MAIN, TAIL)
        y0, y1, y_t0, y_t1 = y0 + bias0, y1 + bias1, y_t0 + bias_t0, y_t1 + bias_t1
        x_t0, x_t1 = x_t0 + gate0 * y_t0 + gate_t0 * y0, x_t1 + gate1 * y_t1 + gate_t1 * y1
        store_row(x_new_t + row * D, x_t0, x_t1, D, MAIN, TAIL)  # to LN it goes as it is, before rounding
        x0, x1 = x0 + gate0 * y0, x1 + gate1 * y1
        # LN reads x_new as stored, like the next kernel
        x0, x1 = x0.to(x_new.dtype.element_ty).to(tl.float32), x1.to(x_new.dtype.element_ty).to(tl.float32)
        store_row(x_new + row * D, x0, x1, D, MAIN, TAIL)
        mu, r, x0, x1 = normalize(x0, x1, eps, D, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)
        x0, x1 = x0 * r, x1 * r
        store_row(h + row * D, x0 * scale0 + shift0, x1 * scale1 + shift1, D, MAIN, TAIL)
        x_t0, x_t1 = layer_norm_tangent(x_t0, x_t1, x0, x1, r, D, TAIL)
        h_t0, h_t1 = x_t0 * scale0 + x0 * scale_t0 + shift_t0, x_t1 * scale1 + x1 * scale_t1 + shift_t1
        store_row(h_t + row * D, h_t0, h_t1, D, MAIN, TAIL)


def forward(x, y, gate, shift, scale, eps, bias, out_dtype):
    """x_new, h (B, N, D); mean and rstd of x_new (B, N) float32."""
    b, n, d = x.shape
    x, y, gate, shift, scale, bias = (unit_stride(t) for t in (x, y, gate, shift, scale, bias))
    x_new, h = x.new_empty(*x.shape), x.new_empty(*x.shape, dtype=out_dtype)
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
    dx_new, dh, y, gate, scale, bias = (unit_stride(t) for t in (dx_new, dh, y, gate, scale, bias))
    chunk, options = backward_options(b, n, d, loads=4)
    chunks = triton.cdiv(n, chunk)
    dx, dy = x_new.new_empty(*x_new.shape), y.new_empty(*y.shape)
    partial = y.new_empty(3 if bias is None else 4, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, dx, dy, partial, n, chunk,
            *dx_new.stride()[:2], *dh.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    modulation, dbias = sum_partials(partial, scale.dtype, None if bias is None else bias.dtype)
    return dx, dy, modulation, gate.new_empty(0) if bias is None else dbias


def jvp(x, y, gate, shift, scale, eps, bias, out_dtype, x_t, y_t, gate_t, shift_t, scale_t, bias_t):
    """The outputs of `forward`, then the tangents of x_new and h in the same dtypes.

    x_t, y_t, gate_t, shift_t, scale_t and bias_t are the tangents of the inputs, None for zero.
    """
    b, n, d = x.shape
    x, y, gate, shift, scale, bias = (unit_stride(t) for t in (x, y, gate, shift, scale, bias))
    tangents = (x_t, y_t, gate_t, shift_t, scale_t, bias_t)
    x_t, y_t, gate_t, shift_t, scale_t, bias_t = (unit_stride(t) for t in tangents)
    x_new, x_new_t = x.new_empty(*x.shape), x.new_empty(*x.shape)
    h, h_t = (x.new_empty(*x.shape, dtype=out_dtype) for _ in range(2))
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = jvp_options(b, n, d, loads=2 + (x_t is not None) + (y_t is not None))
        jvp_kernel[(b * triton.cdiv(n, chunk),)](
            x, y, gate, shift, scale, bias, x_t, y_t, gate_t, shift_t, scale_t, bias_t,
            x_new, h, mean, rstd, x_new_t, h_t, n, chunk, eps,
            *x.stride()[:2], *y.stride()[:2], gate.stride(0), shift.stride(0), scale.stride(0),
            *leading_strides(x_t, 2), *leading_strides(y_t, 2),
            *(s for t in (gate_t, shift_t, scale_t) for s in leading_strides(t, 1)),
            **options,
        )  # fmt: skip
    return x_new, h, mean, rstd, x_new_t, h_t
