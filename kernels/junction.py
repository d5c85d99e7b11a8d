"""x_new = x + gate * (y + bias), h = LN(x_new) * (1 + scale) + shift; contract: ditfast/ops/junction.py.

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
    x, y, gate, shift, scale, bias, x_new, h, mean, rstd, N, chunk, eps,
    x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    _, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    gate_row = load_row(gate + b * gate_b, cols, mask)  # (D,)
    shift_row = load_row(shift + b * shift_b, cols, mask)
    scale_row = 1.0 + load_row(scale + b * scale_b, cols, mask)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        y_row = load_row(y + b * y_b + n * y_n, cols, mask)
        if HAS_BIAS:
            y_row += load_row(bias, cols, mask)
        x_row = load_row(x + b * x_b + n * x_n, cols, mask) + gate_row * y_row
        # LN reads what the next kernel will read: x_new as stored
        x_row = x_row.to(x_new.dtype.element_ty).to(tl.float32)
        mu, r, centred = normalize(x_row, mask, eps, D)
        row = b * N + n
        tl.store(x_new + row * D + cols, x_row.to(x_new.dtype.element_ty), mask=mask)
        h_row = centred * r * scale_row + shift_row
        tl.store(h + row * D + cols, h_row.to(h.dtype.element_ty), mask=mask)
        tl.store(mean + row, mu)
        tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["chunk"])
def backward_kernel(
    dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, dx, dy, partial, N, chunk,
    dx_new_b, dx_new_n, dh_b, dh_n, y_b, y_n, gate_b, scale_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    program, b, first = locate(N, chunk)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    gate_row = load_row(gate + b * gate_b, cols, mask)  # (D,)
    scale_row = 1.0 + load_row(scale + b * scale_b, cols, mask)
    dgate = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dx_sum = tl.zeros((BLOCK,), tl.float32)
    for n in tl.range(first, tl.minimum(first + chunk, N), num_stages=STAGES):
        row = b * N + n
        dh_row = load_row(dh + b * dh_b + n * dh_n, cols, mask)
        x_row = load_row(x_new + row * D, cols, mask)
        r = tl.load(rstd + row)
        xhat = tl.where(mask, (x_row - tl.load(mean + row)) * r, 0.0)
        dshift += dh_row
        dscale += dh_row * xhat
        dx_row = load_row(dx_new + b * dx_new_b + n * dx_new_n, cols, mask)
        dx_row += layer_norm_grad(dh_row, xhat, scale_row, r, D)
        tl.store(dx + row * D + cols, dx_row.to(dx.dtype.element_ty), mask=mask)
        tl.store(dy + row * D + cols, (dx_row * gate_row).to(dy.dtype.element_ty), mask=mask)
        y_row = load_row(y + b * y_b + n * y_n, cols, mask)
        if HAS_BIAS:
            y_row += load_row(bias, cols, mask)
            dx_sum += dx_row
        dgate += dx_row * y_row
    partial += program * D + cols  # (3 or 4, B, chunks, D): dgate, dshift, dscale, dbias
    kind = tl.num_programs(0).to(tl.int64) * D
    tl.store(partial, dgate, mask=mask)
    tl.store(partial + kind, dshift, mask=mask)
    tl.store(partial + 2 * kind, dscale, mask=mask)
    if HAS_BIAS:
        tl.store(partial + 3 * kind, dx_sum * gate_row, mask=mask)


def forward(x, y, gate, shift, scale, eps, bias, out_dtype):
    """x_new, h (B, N, D); mean and rstd of x_new (B, N) float32."""
    b, n, d = x.shape
    x, y, gate, shift, scale = (unit_stride(t) for t in (x, y, gate, shift, scale))
    bias = None if bias is None else unit_stride(bias)
    x_new, h = x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(b, n, dtype=torch.float32) for _ in range(2))
    if x.numel():
        chunk, options = forward_options(b, n, d)
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
    chunk, options = backward_options(b, n, d, x_new.dtype)
    chunks = triton.cdiv(n, chunk)
    dx, dy = x_new.new_empty(x_new.shape), y.new_empty(y.shape)
    partial = y.new_empty(3 if bias is None else 4, b, chunks, d, dtype=torch.float32)
    if y.numel():
        backward_kernel[(b * chunks,)](
            dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, dx, dy, partial, n, chunk,
            *dx_new.stride()[:2], *dh.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0),
            HAS_BIAS=bias is not None, **options,
        )  # fmt: skip
    modulation = sum_partials(partial[:3].flatten(0, 1), scale.dtype).view(3, b, d)
    if bias is None:
        return dx, dy, modulation, gate.new_empty(0)
    return dx, dy, modulation, sum_partials(partial[3].reshape(1, b * chunks, d), bias.dtype)[0]
