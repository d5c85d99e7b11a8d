"""Backward and tangent of GELU (tanh) between the two GEMMs of the MLP; contract: ditfast/ops/mlp.py.

gelu(x) = x * sigmoid(z) with z = 2 * sqrt(2/pi) * (x + CUBIC * x^3); unlike 1 + tanh, this does not cancel for
negative x.

Names of strides (pre_m): kernels/strides.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE
from ditfast.kernels.strides import unit_stride
from ditfast.kernels.sums import sum_partials

SLOPE_AT_ZERO = tl.constexpr(1.5957691216057308)  # dz/dx at 0: 2 * sqrt(2/pi)
CUBIC = tl.constexpr(0.044715)
CUBIC_OF_SLOPE = tl.constexpr(0.134145)  # 3 * CUBIC
END = tl.constexpr(-10.0)  # where exp(-z) leaves float32
LARGE = tl.constexpr(1e37)  # upper limit for exp(-z): infinity times a sigmoid of zero would be NaN
STEEP = tl.constexpr(1e3)  # upper limit for x dz/dx, which is 230 where the sigmoid ends


@triton.jit
def sigmoid_and_derivative(x):
    """sigmoid(z), so that gelu(x) = x * sigmoid(z), and gelu's derivative.

    The sigmoid is zero to the left of END, so that gelu(-infinity) is NaN as in PyTorch. So is the derivative at both
    infinities.
    """
    e = tl.minimum(tl.exp(x * (1.0 + x * x * CUBIC) * -SLOPE_AT_ZERO), LARGE)  # exp(-z)
    sigmoid = tl.where(x < END, 0.0, 1.0 / (1.0 + e))
    rest = e * sigmoid  # 1 - sigmoid, without cancellation
    steep = x * (1.0 + x * x * CUBIC_OF_SLOPE) * SLOPE_AT_ZERO  # x dz/dx
    return sigmoid, sigmoid * (1.0 + rest * tl.clamp(steep, -STEEP, STEEP)) + (x - x)


@triton.jit
def backward_kernel(
    dact, pre, act, partial, M,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, KEEP_ACT: tl.constexpr,
):  # fmt: skip
    """Overwrite dact (M, F) with the gradient before GELU; with KEEP_ACT also write act (M, F)."""
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
        sigmoid, derivative = sigmoid_and_derivative(x)
        dpre = dgelu * derivative
        tl.store(dact + at, dpre.to(dact.dtype.element_ty), mask=mask)
        if KEEP_ACT:
            tl.store(act + at, (x * sigmoid).to(act.dtype.element_ty), mask=mask)
        total += dpre
    tl.store(partial + program // blocks * F + cols, tl.sum(total, 0), mask=cols < F)


@triton.jit
def jvp_kernel(pre, pre_t, act, act_t, M, pre_m, pre_t_m, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    blocks = tl.cdiv(F, COLS)
    program = tl.program_id(0).to(tl.int64)
    cols = program % blocks * COLS + tl.arange(0, COLS)
    rows = program // blocks * ROWS + tl.arange(0, ROWS)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    x = tl.load(pre + rows[:, None] * pre_m + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # (ROWS, COLS)
    x_t = tl.load(pre_t + rows[:, None] * pre_t_m + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid, derivative = sigmoid_and_derivative(x)
    at = rows[:, None] * F + cols[None, :]
    tl.store(act + at, (x * sigmoid).to(act.dtype.element_ty), mask=mask)
    tl.store(act_t + at, (x_t * derivative).to(act_t.dtype.element_ty), mask=mask)


def backward_(dact, pre, keep_act: bool, bias_dtype):
    """Overwrite dact (M, F) with the gradient before GELU; return act (M, F) if kept, and dbias (F,)."""
    m, f = pre.shape
    chunk = 64 if m >= 8192 else 16
    chunks = triton.cdiv(m, chunk)
    act = pre.new_empty(*pre.shape) if keep_act else None
    partial = pre.new_empty(1, 1, chunks, f, dtype=torch.float32)
    if m:
        backward_kernel[(chunks * triton.cdiv(f, 512),)](
            dact, pre, act, partial, m,
            F=f, ROWS=4, COLS=512, CHUNK=chunk, KEEP_ACT=keep_act, num_warps=4, **FUSE,
        )  # fmt: skip
    return act, sum_partials(partial, torch.float32, bias_dtype)[1]


def jvp(pre, pre_t):
    """act = gelu(pre), (M, F), and its tangent act_t, given the tangent pre_t of pre."""
    m, f = pre.shape
    pre, pre_t = unit_stride(pre), unit_stride(pre_t)
    act, act_t = pre.new_empty(*pre.shape), pre.new_empty(*pre.shape)
    if act.numel():
        jvp_kernel[(triton.cdiv(m, 4) * triton.cdiv(f, 512),)](
            pre, pre_t, act, act_t, m, pre.stride(0), pre_t.stride(0), F=f, ROWS=4, COLS=512, num_warps=4, **FUSE
        )
    return act, act_t
