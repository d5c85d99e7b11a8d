"""Self-attention on packed qkv, without padding head dim 72; contract: ditfast/ops/attention.py.

A head's d columns are split into MAIN = 64 and TAIL = 16, of which d - 64 are real (none for d = 64): tensor cores
need powers of two, and 80 columns cost less than 128. Each program owns a tile of rows of one head and loops over the
other tiles. In backward, one kernel owns keys (dK, dV) and one owns queries (dQ), so no sum has two writers; both
compute delta = rowsum(dO * O) themselves. Softmax uses base 2.

The gradient of qkv's bias, dqkv summed over tokens, comes from the dQ kernel alone, before rounding. With P the
attention weights, whose rows sum to one, the sum of dV = P^T dO equals that of dO. The sum of dK = scale * dS^T Q is
zero, since every row of dS = P * (dP - delta) sums to zero: a bias on the keys shifts all logits of a query alike.

Names of strides (qkv_b, qkv_n): kernels/strides.py.
"""

import os

import torch
import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE
from ditfast.kernels.sums import sum_partials

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(N, H, BLOCK: tl.constexpr):
    """Sample, head and first row of a program; a sample's heads are adjacent, as in memory."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK)
    return program // tiles // H, program // tiles % H, program % tiles * BLOCK


@triton.jit
def tile_at(base, first, stride, N, D: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers and mask of rows from ``first`` and columns from FIRST on, within N rows and D columns.

    The first row's address is int64; offsets inside a tile are int32, which takes fewer registers.
    """
    rows, cols = tl.arange(0, ROWS), FIRST + tl.arange(0, COLS)
    mask = (rows < N - first)[:, None] & (cols < D)[None, :]
    return base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + cols[None, :]), mask


@triton.jit
def load_tile(base, first, stride, N, D: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS), zeros outside."""
    pointers, mask = tile_at(base, first, stride, N, D, FIRST, ROWS, COLS)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(
    base, first, stride, N, value, D: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    pointers, mask = tile_at(base, first, stride, N, D, FIRST, ROWS, COLS)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_sums(at, value, D: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Store the column sums of ``value`` (ROWS, COLS) in float32."""
    cols = FIRST + tl.arange(0, COLS)
    tl.store(at + cols, tl.sum(value.to(tl.float32), 0), mask=cols < D)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b, accumulated in float32; UPCAST is for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def forward_kernel(
    qkv, out, lse, N, H, qkv_b, qkv_n, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    b, h, own = locate(N, H, BLOCK_M)
    q = qkv + b * qkv_b + h * D
    k, v = q + H * D, q + 2 * H * D
    q0 = load_tile(q, own, qkv_n, N, D, 0, BLOCK_M, MAIN)  # (BLOCK_M, MAIN)
    o0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q1 = load_tile(q, own, qkv_n, N, D, MAIN, BLOCK_M, TAIL)
        o1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        s = dot(q0, tl.trans(load_tile(k, first, qkv_n, N, D, 0, BLOCK_N, MAIN)), UPCAST)  # (BLOCK_M, BLOCK_N)
        if TAIL:
            s += dot(q1, tl.trans(load_tile(k, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL)), UPCAST)
        s = tl.where((keys < N)[None, :], s * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        p = p.to(qkv.dtype.element_ty)
        o0 = o0 * shrink[:, None] + dot(p, load_tile(v, first, qkv_n, N, D, 0, BLOCK_N, MAIN), UPCAST)
        if TAIL:
            o1 = o1 * shrink[:, None] + dot(p, load_tile(v, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL), UPCAST)
        top = new_top
    o = out + b * N * H * D + h * D
    store_tile(o, own, H * D, N, o0 / total[:, None], D, 0, BLOCK_M, MAIN)
    if TAIL:
        store_tile(o, own, H * D, N, o1 / total[:, None], D, MAIN, BLOCK_M, TAIL)
    rows = own + tl.arange(0, BLOCK_M)
    tl.store(lse + (b * H + h) * N + rows, (top + tl.log2(total)) * LN2, mask=rows < N)


@triton.jit
def backward_dkdv_kernel(
    dout, qkv, out, lse, dqkv, N, H, dout_b, dout_n, qkv_b, qkv_n, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    b, h, own = locate(N, H, BLOCK_N)
    q = qkv + b * qkv_b + h * D
    k, v = q + H * D, q + 2 * H * D
    do, o = dout + b * dout_b + h * D, out + b * N * H * D + h * D
    k0 = load_tile(k, own, qkv_n, N, D, 0, BLOCK_N, MAIN)  # (BLOCK_N, MAIN)
    v0 = load_tile(v, own, qkv_n, N, D, 0, BLOCK_N, MAIN)
    dk0 = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv0 = tl.zeros((BLOCK_N, MAIN), tl.float32)
    if TAIL:
        k1 = load_tile(k, own, qkv_n, N, D, MAIN, BLOCK_N, TAIL)
        v1 = load_tile(v, own, qkv_n, N, D, MAIN, BLOCK_N, TAIL)
        dk1 = tl.zeros((BLOCK_N, TAIL), tl.float32)
        dv1 = tl.zeros((BLOCK_N, TAIL), tl.float32)
    for first in range(0, N, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        q0 = load_tile(q, first, qkv_n, N, D, 0, BLOCK_M, MAIN)  # (BLOCK_M, MAIN)
        do0 = load_tile(do, first, dout_n, N, D, 0, BLOCK_M, MAIN)
        o0 = load_tile(o, first, H * D, N, D, 0, BLOCK_M, MAIN)
        delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), 1)  # (BLOCK_M,)
        s = dot(k0, tl.trans(q0), UPCAST)  # (BLOCK_N, BLOCK_M)
        dp = dot(v0, tl.trans(do0), UPCAST)
        if TAIL:
            q1 = load_tile(q, first, qkv_n, N, D, MAIN, BLOCK_M, TAIL)
            do1 = load_tile(do, first, dout_n, N, D, MAIN, BLOCK_M, TAIL)
            o1 = load_tile(o, first, H * D, N, D, MAIN, BLOCK_M, TAIL)
            delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), 1)
            s += dot(k1, tl.trans(q1), UPCAST)
            dp += dot(v1, tl.trans(do1), UPCAST)
        norm = tl.load(lse + (b * H + h) * N + rows, mask=rows < N, other=0.0) * LOG2E
        p = tl.where((rows < N)[None, :], tl.exp2(s * (scale * LOG2E) - norm[None, :]), 0.0)
        ds = (p * (dp - delta[None, :])).to(qkv.dtype.element_ty)
        p = p.to(qkv.dtype.element_ty)
        dv0 += dot(p, do0, UPCAST)
        dk0 += dot(ds, q0, UPCAST)
        if TAIL:
            dv1 += dot(p, do1, UPCAST)
            dk1 += dot(ds, q1, UPCAST)
    dk = dqkv + b * N * 3 * H * D + (H + h) * D
    dv = dk + H * D
    store_tile(dk, own, 3 * H * D, N, dk0 * scale, D, 0, BLOCK_N, MAIN)
    store_tile(dv, own, 3 * H * D, N, dv0, D, 0, BLOCK_N, MAIN)
    if TAIL:
        store_tile(dk, own, 3 * H * D, N, dk1 * scale, D, MAIN, BLOCK_N, TAIL)
        store_tile(dv, own, 3 * H * D, N, dv1, D, MAIN, BLOCK_N, TAIL)


@triton.jit
def backward_dq_kernel(
    dout, qkv, out, lse, dqkv, partial, N, H, dout_b, dout_n, qkv_b, qkv_n, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """With BIAS, also write the tile's share of qkv's bias gradient to a row of partial (B * tiles, 3*H*d)."""
    b, h, own = locate(N, H, BLOCK_M)
    q = qkv + b * qkv_b + h * D
    k, v = q + H * D, q + 2 * H * D
    do, o = dout + b * dout_b + h * D, out + b * N * H * D + h * D
    q0 = load_tile(q, own, qkv_n, N, D, 0, BLOCK_M, MAIN)  # (BLOCK_M, MAIN)
    do0 = load_tile(do, own, dout_n, N, D, 0, BLOCK_M, MAIN)
    delta = tl.sum(do0.to(tl.float32) * load_tile(o, own, H * D, N, D, 0, BLOCK_M, MAIN).to(tl.float32), 1)
    dq0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q1 = load_tile(q, own, qkv_n, N, D, MAIN, BLOCK_M, TAIL)
        do1 = load_tile(do, own, dout_n, N, D, MAIN, BLOCK_M, TAIL)
        delta += tl.sum(do1.to(tl.float32) * load_tile(o, own, H * D, N, D, MAIN, BLOCK_M, TAIL).to(tl.float32), 1)
        dq1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    if BIAS:
        db = partial + (b * tl.cdiv(N, BLOCK_M) + own // BLOCK_M) * 3 * H * D + h * D
        store_sums(db + H * D, tl.zeros((1, MAIN), tl.float32), D, 0, MAIN)
        store_sums(db + 2 * H * D, do0, D, 0, MAIN)
        if TAIL:
            store_sums(db + H * D, tl.zeros((1, TAIL), tl.float32), D, MAIN, TAIL)
            store_sums(db + 2 * H * D, do1, D, MAIN, TAIL)
    rows = own + tl.arange(0, BLOCK_M)
    norm = tl.load(lse + (b * H + h) * N + rows, mask=rows < N, other=0.0) * LOG2E
    for first in range(0, N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k0 = load_tile(k, first, qkv_n, N, D, 0, BLOCK_N, MAIN)
        s = dot(q0, tl.trans(k0), UPCAST)  # (BLOCK_M, BLOCK_N)
        dp = dot(do0, tl.trans(load_tile(v, first, qkv_n, N, D, 0, BLOCK_N, MAIN)), UPCAST)
        if TAIL:
            k1 = load_tile(k, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL)
            s += dot(q1, tl.trans(k1), UPCAST)
            dp += dot(do1, tl.trans(load_tile(v, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL)), UPCAST)
        p = tl.where((keys < N)[None, :], tl.exp2(s * (scale * LOG2E) - norm[:, None]), 0.0)
        ds = (p * (dp - delta[:, None])).to(qkv.dtype.element_ty)
        dq0 += dot(ds, k0, UPCAST)
        if TAIL:
            dq1 += dot(ds, k1, UPCAST)
    dq = dqkv + b * N * 3 * H * D + h * D
    store_tile(dq, own, 3 * H * D, N, dq0 * scale, D, 0, BLOCK_M, MAIN)
    if TAIL:
        store_tile(dq, own, 3 * H * D, N, dq1 * scale, D, MAIN, BLOCK_M, TAIL)
    if BIAS:  # rows past the last token add nothing: their q, dO and hence ds are zero
        store_sums(db, dq0 * scale, D, 0, MAIN)
        if TAIL:
            store_sums(db, dq1 * scale, D, MAIN, TAIL)


# (BLOCK_M, BLOCK_N, warps, stages) by compute capability: the ones that compile without spills. Of two, the first is
# used until both have been timed. With a second stage for dK/dV, ptxas would serialize its wgmma.
TILES = {
    (9, 0): {
        "forward": ((128, 64, 8, 3), (64, 64, 4, 3)),
        "dkdv": ((64, 64, 4, 1),),
        "dq": ((128, 64, 8, 2), (64, 64, 4, 2)),
        "jvp": ((128, 64, 8, 2), (64, 64, 4, 2)),
    },
    (8, 0): {
        "forward": ((64, 32, 4, 3),),
        "dkdv": ((32, 64, 4, 1),),
        "dq": ((64, 32, 4, 2),),
        "jvp": ((64, 32, 4, 2),),
    },
}
FLOAT32_TILES = {  # no tensor cores
    "forward": ((32, 32, 4, 1),),
    "dkdv": ((32, 32, 8, 1),),
    "dq": ((16, 16, 8, 1),),
    "jvp": ((32, 16, 8, 1),),
}


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def tiles(qkv, kernel: str, choice: int = 0) -> dict:
    """Launch parameters of "forward", "dkdv", "dq" or "jvp": Hopper's own, or ones that fit any GPU since Ampere."""
    table = FLOAT32_TILES if qkv.dtype == torch.float32 else TILES.get(capability(qkv.device), TILES[8, 0])
    m, n, warps, stages = table[kernel][min(choice, len(table[kernel]) - 1)]
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, **FUSE}


def head_options(qkv, head_dim):
    upcast = os.environ.get("TRITON_INTERPRET") == "1" and qkv.dtype == torch.bfloat16
    return {"D": head_dim, "MAIN": 64, "TAIL": 0 if head_dim == 64 else 16, "UPCAST": upcast}


def forward(qkv, num_heads, scale):
    """out (B, N, H*d), lse (B, H, N) float32; qkv (B, N, 3*H*d) with unit stride in its last dimension."""
    b, n, width = qkv.shape
    out = qkv.new_empty(b, n, width // 3)
    lse = qkv.new_empty(b, num_heads, n, dtype=torch.float32)
    if out.numel():
        options = tiles(qkv, "forward")
        forward_kernel[(b * num_heads * triton.cdiv(n, options["BLOCK_M"]),)](
            qkv, out, lse, n, num_heads, *qkv.stride()[:2], scale,
            **head_options(qkv, width // 3 // num_heads), **options,
        )  # fmt: skip
    return out, lse


def backward(dout, qkv, out, lse, scale, bias_dtype: torch.dtype | None = None):
    """dqkv (B, N, 3*H*d), and its sum over B and N in ``bias_dtype``, or None.

    dout has unit stride in its last dimension; out is contiguous.
    """
    (b, n, width), num_heads = qkv.shape, lse.shape[1]
    keys, queries = tiles(qkv, "dkdv"), tiles(qkv, "dq")
    options = head_options(qkv, width // 3 // num_heads)
    parts = triton.cdiv(n, queries["BLOCK_M"])
    dqkv, bias = qkv.new_empty(*qkv.shape), bias_dtype is not None
    partial = qkv.new_empty(1, b, parts, width, dtype=torch.float32) if bias else None
    strides = *dout.stride()[:2], *qkv.stride()[:2]
    if dqkv.numel():
        backward_dkdv_kernel[(b * num_heads * triton.cdiv(n, keys["BLOCK_N"]),)](
            dout, qkv, out, lse, dqkv, n, num_heads, *strides, scale, **options, **keys
        )
        backward_dq_kernel[(b * num_heads * parts,)](
            dout, qkv, out, lse, dqkv, partial, n, num_heads, *strides, scale, **options, BIAS=bias, **queries
        )
    return dqkv, sum_partials(partial, torch.float32, bias_dtype)[1] if bias else None
