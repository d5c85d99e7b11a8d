"""h = LN(x) * (1 + scale) + shift; contract: ditfast/ops/layer_norm_modulate.py.

Names of strides (x_b, x_n): kernels/strides.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import (
    backward_options,
    forward_options,
    layer_norm_grad,
    load_row,
    locate,
    normalize,
    sum_partials,
)
from ditfast.kernels.strides import unit_stride


@triton.jit(do_not_specialize=["chunk"])
def forward_kernel(
    x, shift, scale, h, mean, rstd, N, chunk, eps,
    x_b, x_n, shift_b, scale_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    shift_row = load_row(shift + b * shift_b, cols, mask)  # (D,)
    scale_row = 1.0 + load_row(scale + b * scale_b, cols, mask)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        x_row = load_row(x + b * x_b + n * x_n, cols, mask)
        mu, r, centred = normalize(x_row, mask, eps, D)
        h_row = centred * r * scale_row + shift_row
        row = b * N + n
        tl.store(h + row * D + cols, h_row.to(h.dtype.element_ty), mask=mask)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dh, x, scale, mean, rstd, dx, partial, N, chunk,
    dh_b, dh_n, x_b, x_n, scale_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    scale_row = 1.0 + load_row(scale + b * scale_b, cols, mask)  # (D,)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        row = b * N + n
        dh_row = load_row(dh + b * dh_b + n * dh_n, cols, mask)
        x_row = load_row(x + b * x_b + n * x_n, cols, mask)
        r = tl.load(rstd + row)
        xhat = tl.where(mask, (x_row - tl.load(mean + row)) * r, 0.0)
        dx_row = layer_norm_grad(dh_row, xhat, scale_row, r, D)
        tl.store(dx + row * D + cols, dx_row.to(dx.dtype.element_ty), mask=mask)
        dshift += dh_row
        dscale += dh_row * xhat
    partial += program * D + cols  # (2, B, chunks, D): dshift, dscale
    tl.store(partial, dshift, mask=mask)
    tl.store(partial + tl.num_programs(0).to(tl.int64) * D, dscale, mask=mask)


def forward(x, shift, scale, eps, out_dtype):
    """h (B, N, D), mean and rstd (B, N) float32."""
    b, n, d = x.shape
    x, shift, scale = unit_stride(x), unit_stride(shift), unit_stride(scale)
    h = x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = forward_options(b, n, d)
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
    chunk, options = backward_options(b, n, d, x.dtype)
    chunks = triton.cdiv(n, chunk)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(2, b, chunks, d, dtype=torch.float32)
    if x.numel():
        backward_kernel[(b * chunks,)](
            dh, x, scale, mean, rstd, dx, partial, n, chunk,
            *dh.stride()[:2], *x.stride()[:2], scale.stride(0),
            **options,
        )  # fmt: skip
    return dx, sum_partials(partial.flatten(0, 1), scale.dtype).view(2, b, d)
