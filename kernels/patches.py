"""Between images (B, C, H, W) and patch tokens (B, N, C*p*p); contract: ditfast/ops/patches.py.

A token's elements are ordered (c, ph, pw), or (ph, pw, c) with LAST. Images may have any strides.
Names of strides (x_b, x_c): kernels/strides.py.
"""

import triton
import triton.language as tl

from ditfast.kernels.rows import FUSE


@triton.jit
def element(j, C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr):
    """Channel, row and column of a token's j-th element inside its patch."""
    if LAST:
        c, ph, pw = j % C, j // (C * P), j // C % P
    else:
        c, ph, pw = j // (P * P), j // P % P, j % P
    return c, ph, pw


@triton.jit
def patchify_kernel(
    x, tokens, total, grid_w, tokens_per_image, x_b, x_c, x_h, x_w,
    C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # in tokens, contiguous
    mask = at < total
    row, j = at // (C * P * P), at % (C * P * P)
    b, n = row // tokens_per_image, row % tokens_per_image
    c, ph, pw = element(j, C, P, LAST)
    h, w = n // grid_w * P + ph, n % grid_w * P + pw
    value = tl.load(x + b * x_b + c * x_c + h * x_h + w * x_w, mask=mask)
    tl.store(tokens + at, value, mask=mask)


@triton.jit
def unpatchify_kernel(
    tokens, x, total, height, width, tokens_b, tokens_n, tokens_j,
    C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # in the image, contiguous
    mask = at < total
    w, h = at % width, at // width % height
    c, b = at // width // height % C, at // width // height // C
    n = h // P * (width // P) + w // P
    j = (h % P * P + w % P) * C + c if LAST else (c * P + h % P) * P + w % P
    value = tl.load(tokens + b * tokens_b + n * tokens_n + j * tokens_j, mask=mask)
    tl.store(x + at, value, mask=mask)


@triton.jit
def embed_kernel(
    x, weight, bias, pos, out, grid_w, N, x_b, x_c, x_h, x_w, pos_n,
    D: tl.constexpr, C: tl.constexpr, P: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n, tiles_d = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    n = program // tiles_d % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = program % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // tiles_d // tiles_n
    n_live, d_live = n < N, d < D
    corner = x + b * x_b + n // grid_w * P * x_h + n % grid_w * P * x_w  # (BLOCK_N,)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        c, ph, pw = element(k, C, P, False)
        offset = c.to(tl.int64) * x_c + ph * x_h + pw * x_w
        patch = tl.load(corner[:, None] + offset[None, :], mask=n_live[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight + d[None, :] * K + k[:, None], mask=d_live[None, :] & (k < K)[:, None], other=0.0)
        # float16 and bfloat16 are exact in tf32, so the upcast costs no precision and keeps the tensor cores
        total += tl.dot(patch.to(tl.float32), w.to(tl.float32), input_precision=PRECISION)
    mask = n_live[:, None] & d_live[None, :]
    total += tl.load(bias + d, mask=d_live, other=0.0).to(tl.float32)[None, :]
    total += tl.load(pos + n[:, None] * pos_n + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (b * N + n)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


def patchify(x, patch_size, channels_last):
    """(B, C, H, W) -> (B, N, C*p*p)."""
    b, c, height, width = x.shape
    p, n = patch_size, (height // patch_size) * (width // patch_size)
    tokens = x.new_empty(b, n, c * p * p)
    if tokens.numel():
        patchify_kernel[(triton.cdiv(tokens.numel(), 1024),)](
            x, tokens, tokens.numel(), width // p, n, *x.stride(), C=c, P=p, LAST=channels_last, BLOCK=1024, **FUSE
        )
    return tokens


def unpatchify(tokens, patch_size, grid_h, grid_w, channels_last):
    """(B, N, C*p*p) -> (B, C, H, W)."""
    (b, _, width), p = tokens.shape, patch_size
    c = width // (p * p)
    x = tokens.new_empty(b, c, grid_h * p, grid_w * p)
    if x.numel():
        unpatchify_kernel[(triton.cdiv(x.numel(), 1024),)](
            tokens, x, x.numel(), grid_h * p, grid_w * p, *tokens.stride(),
            C=c, P=p, LAST=channels_last, BLOCK=1024, **FUSE,
        )  # fmt: skip
    return x


def patch_embed(x, weight, bias, pos, patch_size, out_dtype):
    """(B, N, D); weight (D, C*p*p) contiguous, bias (D,), pos (N, D) with unit stride in D."""
    b, c, height, width = x.shape
    (d, k), p, n = weight.shape, patch_size, (height // patch_size) * (width // patch_size)
    out = x.new_empty(b, n, d, dtype=out_dtype)
    if out.numel():
        exact = any(t.element_size() > 2 for t in (x, weight))
        block_n, block_d = (32, 64) if exact else (64, 128)  # no tensor cores: many sums per thread
        tiles = triton.cdiv(n, block_n) * triton.cdiv(d, block_d)
        embed_kernel[(b * tiles,)](
            x, weight, bias, pos, out, width // p, n, *x.stride(), pos.stride(0),
            D=d, C=c, P=p, K=k, PRECISION="ieee" if exact else "tf32",
            BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_K=16 if exact or k <= 16 else 32, num_warps=4, **FUSE,
        )  # fmt: skip
    return out
