"""Attention and its tangent in one pass over the keys; contract: ditfast/ops/attention.py.

With S = scale * Q K^T, P = softmax(S), O = P V, and a tangent's name ending in _t:

    S_t = scale * (Q_t K^T + Q K_t^T)
    O_t = P V_t + (P * (S_t - r)) V,  r = rowsum(P * S_t), one value per query.

r is known only after the last key. So the pass sums P V_t + (P * (S_t - c)) V and drift = rowsum(P * (S_t - c)), both
rescaled with O as the largest logit grows, and subtracts drift * O at the end, which is exact for any c per query. c
is r over the first tile of keys, so that whatever a query's logit tangents have in common (all that the tangent of
the keys' bias contributes) cancels before weights are rounded to 16 bits.

Source: Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", appendix on the JVP of
flash attention, which has no c. Tiles, head split and names are those of kernels/attention.py.
"""

import torch
import triton
import triton.language as tl

from ditfast.kernels.attention import LN2, LOG2E, dot, head_options, load_tile, locate, store_tile, tiles


@triton.jit
def jvp_kernel(
    qkv, qkv_t, out, lse, out_t, N, H, qkv_b, qkv_n, qkv_t_b, qkv_t_n, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    b, h, own = locate(N, H, BLOCK_M)
    q, q_t = qkv + b * qkv_b + h * D, qkv_t + b * qkv_t_b + h * D
    k, k_t, v, v_t = q + H * D, q_t + H * D, q + 2 * H * D, q_t + 2 * H * D
    q0 = load_tile(q, own, qkv_n, N, D, 0, BLOCK_M, MAIN)  # (BLOCK_M, MAIN)
    q_t0 = load_tile(q_t, own, qkv_t_n, N, D, 0, BLOCK_M, MAIN)
    o0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    o_t0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q1 = load_tile(q, own, qkv_n, N, D, MAIN, BLOCK_M, TAIL)
        q_t1 = load_tile(q_t, own, qkv_t_n, N, D, MAIN, BLOCK_M, TAIL)
        o1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
        o_t1 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    drift = tl.zeros((BLOCK_M,), tl.float32)
    centre = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, N, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k0 = tl.trans(load_tile(k, first, qkv_n, N, D, 0, BLOCK_N, MAIN))  # (MAIN, BLOCK_N)
        s = dot(q0, k0, UPCAST)  # (BLOCK_M, BLOCK_N)
        s_t = dot(q_t0, k0, UPCAST)
        s_t += dot(q0, tl.trans(load_tile(k_t, first, qkv_t_n, N, D, 0, BLOCK_N, MAIN)), UPCAST)
        if TAIL:
            k1 = tl.trans(load_tile(k, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL))
            s += dot(q1, k1, UPCAST)
            s_t += dot(q_t1, k1, UPCAST)
            s_t += dot(q1, tl.trans(load_tile(k_t, first, qkv_t_n, N, D, MAIN, BLOCK_N, TAIL)), UPCAST)
        s = tl.where((keys < N)[None, :], s * (scale * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = tl.sum(p, 1)
        moment = tl.sum(p * s_t, 1) * scale
        centre = tl.where(first == 0, moment / mass, centre)
        p_t = (p * (s_t * scale - centre[:, None])).to(qkv.dtype.element_ty)
        p = p.to(qkv.dtype.element_ty)
        total = total * shrink + mass
        drift = drift * shrink + (moment - centre * mass)
        v0 = load_tile(v, first, qkv_n, N, D, 0, BLOCK_N, MAIN)  # (BLOCK_N, MAIN)
        o0 = o0 * shrink[:, None] + dot(p, v0, UPCAST)
        o_t0 = o_t0 * shrink[:, None] + dot(p_t, v0, UPCAST)
        o_t0 += dot(p, load_tile(v_t, first, qkv_t_n, N, D, 0, BLOCK_N, MAIN), UPCAST)
        if TAIL:
            v1 = load_tile(v, first, qkv_n, N, D, MAIN, BLOCK_N, TAIL)
            o1 = o1 * shrink[:, None] + dot(p, v1, UPCAST)
            o_t1 = o_t1 * shrink[:, None] + dot(p_t, v1, UPCAST)
            o_t1 += dot(p, load_tile(v_t, first, qkv_t_n, N, D, MAIN, BLOCK_N, TAIL), UPCAST)
        top = new_top
    total_column, drift = total[:, None], (drift / total)[:, None]
    o, o_t = out + b * N * H * D + h * D, out_t + b * N * H * D + h * D
    o0 = o0 / total_column
    store_tile(o, own, H * D, N, o0, D, 0, BLOCK_M, MAIN)
    store_tile(o_t, own, H * D, N, o_t0 / total_column - drift * o0, D, 0, BLOCK_M, MAIN)
    if TAIL:
        o1 = o1 / total_column
        store_tile(o, own, H * D, N, o1, D, MAIN, BLOCK_M, TAIL)
        store_tile(o_t, own, H * D, N, o_t1 / total_column - drift * o1, D, MAIN, BLOCK_M, TAIL)
    rows = own + tl.arange(0, BLOCK_M)
    tl.store(lse + (b * H + h) * N + rows, (top + tl.log2(total)) * LN2, mask=rows < N)


def jvp(qkv, qkv_t, num_heads, scale):
    """out (B, N, H*d), lse (B, H, N) float32, and out_t, the tangent of out.

    qkv and its tangent qkv_t (B, N, 3*H*d) have unit stride in their last dimension.
    """
    b, n, width = qkv.shape
    out, out_t = (qkv.new_empty(b, n, width // 3) for _ in range(2))
    lse = qkv.new_empty(b, num_heads, n, dtype=torch.float32)
    if out.numel():
        options = tiles(qkv, "jvp")
        jvp_kernel[(b * num_heads * triton.cdiv(n, options["BLOCK_M"]),)](
            qkv, qkv_t, out, lse, out_t, n, num_heads, *qkv.stride()[:2], *qkv_t.stride()[:2], scale,
            **head_options(qkv, width // 3 // num_heads), **options,
        )  # fmt: skip
    return out, lse, out_t
