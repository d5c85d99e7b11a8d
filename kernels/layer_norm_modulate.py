"""h = LN(x) * (1 + scale) + shift; contract: ditfast/ops/layer_norm_modulate.py.

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
    x, shift, scale, h, mean, rstd, N, chunk, eps,
    x_b, x_n, shift_b, scale_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    shift0, shift1 = load_row(shift + b * shift_b, D, MAIN, TAIL)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        mu, r, x0, x1 = normalize(x0, x1, eps, D, MAIN, TAIL)
        row = b * N + n
        store_row(h + row * D, x0 * r * scale0 + shift0, x1 * r * scale1 + shift1, D, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dh, x, scale, mean, rstd, dx, partial, N, chunk,
    dh_b, dh_n, x_b, x_n, scale_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    dshift0, dshift1 = zero_row(MAIN, TAIL)
    dscale0, dscale1 = zero_row(MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        row = b * N + n
        dh0, dh1 = load_row(dh + b * dh_b + n * dh_n, D, MAIN, TAIL)
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        r = tl.load(rstd + row)
        x0, x1 = centre(x0, x1, tl.load(mean + row), D, MAIN, TAIL)
        xhat0, xhat1 = x0 * r, x1 * r
        dx0, dx1 = layer_norm_grad(dh0, dh1, xhat0, xhat1, scale0, scale1, r, D, TAIL)
        store_row(dx + row * D, dx0, dx1, D, MAIN, TAIL)
        dshift0, dshift1 = dshift0 + dh0, dshift1 + dh1
        dscale0, dscale1 = dscale0 + dh0 * xhat0, dscale1 + dh1 * xhat1
    partial += program * D  # (2, B, chunks, D): dshift, dscale
    store_row(partial, dshift0, dshift1, D, MAIN, TAIL)
    store_row(partial + tl.num_programs(0).to(tl.int64) * D, dscale0, dscale1, D, MAIN, TAIL)


@triton.jit(do_not_specialize=["chunk"])
def jvp_kernel(
    x, shift, scale, x_t, shift_t, scale_t, h, mean, rstd, h_t, N, chunk, eps,
    x_b, x_n, shift_b, scale_b, x_t_b, x_t_n, shift_t_b, scale_t_b,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each tangent may be None, meaning zero."""
    _, b, first = locate(N, chunk)
    shift0, shift1 = load_row(shift + b * shift_b, D, MAIN, TAIL)
    scale0, scale1 = load_row(scale + b * scale_b, D, MAIN, TAIL)
    scale0, scale1 = 1.0 + scale0, 1.0 + scale1
    shift_t0, shift_t1 = load_optional_row(shift_t, b * shift_t_b, D, MAIN, TAIL)
    scale_t0, scale_t1 = load_optional_row(scale_t, b * scale_t_b, D, MAIN, TAIL)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x0, x1 = load_row(x + b * x_b + n * x_n, D, MAIN, TAIL)
        mu, r, x0, x1 = normalize(x0, x1, eps, D, MAIN, TAIL)
        x0, x1 = x0 * r, x1 * r
        row = b * N + n
        store_row(h + row * D, x0 * scale0 + shift0, x1 * scale1 + shift1, D, MAIN, TAIL)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)
        h_t0, h_t1 = x0 * scale_t0 + shift_t0, x1 * scale_t1 + shift_t1
        if x_t is not None:
            x_t0, x_t1 = load_row(x_t + b * x_t_b + n * x_t_n, D, MAIN, TAIL)
            x_t0, x_t1 = layer_norm_tangent(x_t0, x_t1, x0, x1, r, D, TAIL)
            h_t0, h_t1 = h_t0 + x_t0 * scale0, h_t1 + x_t1 * scale1
        store_row(h_t + row * D, h_t0, h_t1, D, MAIN, TAIL)


def forward(x, shift, scale, eps, out_dtype):
    """h (B, N, D), mean and rstd (B, N) float32."""
    b, n, d = x.shape
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    h = x.new_empty(*x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = forward_options(b, n, d, loads=1)
        forward_kernel[(b * triton.cdiv(n, chunk),)](
            x, shift, scale, h, mean, rstd, n, chunk, eps,
            *x.stride()[:2], shift.stride(0), scale.stride(0),
            **options,
        )  # fmt: skip
    return h, mean, rstd


def backward(dh, x, scale, mean, rstd):
    """dx (B, N, D) and (2, B, D): dshift, dscale."""
    b, n, d = x.shape
    dh, x, scale = unit_stride(dh), unit_stride(x), unit_stride(scale)
    chunk, options = backward_options(b, n, d, loads=2)
    chunks = triton.cdiv(n, chunk)
    dx = x.new_empty(*x.shape)
    partial = x.new_empty(2, b, chunks, d, dtype=torch.float32)
    if x.numel():
        backward_kernel[(b * chunks,)](
            dh, x, scale, mean, rstd, dx, partial, n, chunk,
            *dh.stride()[:2], *x.stride()[:2], scale.stride(0),
            **options,
        )  # fmt: skip
    return dx, sum_partials(partial, scale.dtype, None)[0]


def jvp(x, shift, scale, eps, out_dtype, x_t, shift_t, scale_t):
    """h (B, N, D), mean and rstd (B, N) float32, and h_t, the tangent of h.

    x_t, shift_t and scale_t are the tangents of x, shift and scale, None for zero.
    """
    b, n, d = x.shape
    x, shift, scale, x_t, shift_t, scale_t = (unit_stride(t) for t in (x, shift, scale, x_t, shift_t, scale_t))
    h, h_t = (x.new_empty(*x.shape, dtype=out_dtype) for _ in range(2))
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = jvp_options(b, n, d, loads=1 if x_t is None else 2)
        jvp_kernel[(b * triton.cdiv(n, chunk),)](
            x, shift, scale, x_t, shift_t, scale_t, h, mean, rstd, h_t, n, chunk, eps,
            *x.stride()[:2], shift.stride(0), scale.stride(0),
            *leading_strides(x_t, 2), *leading_strides(shift_t, 1), *leading_strides(scale_t, 1),
            **options,
        )  # fmt: skip
    return h, mean, rstd, h_t
