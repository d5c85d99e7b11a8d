"""What the kernels over token rows (B, N, D) share.

Every program owns a chunk of consecutive tokens of one sample and walks over them with the whole row (D)
in registers, so that the sample's shift, scale and gate are loaded once per chunk. Backward programs keep
their sums over tokens in float32 registers and write them once per chunk; `sum_partials` adds the chunks in
a fixed order.
"""

import torch
import triton
import triton.language as tl

FUSE = {"enable_fp_fusion": True}  # a * b + c in one rounding; Triton wants it said, its default is changing


def forward_options(batch: int, tokens: int, d: int) -> tuple[int, dict]:
    """Tokens per program, at most 4 and so that about 1024 programs remain; 16 elements of a row per thread."""
    return _chunk_size(batch * tokens, programs=1024, most=4), _options(d, per_thread=16, stages=3)


def backward_options(batch: int, tokens: int, d: int, stream: torch.dtype) -> tuple[int, dict]:
    """Tokens per program, at most 32; 8 elements per thread, since the sums over tokens live in registers.

    The rows in flight are what compiles without spills for sm_80, 90 and 120, for each size of the residual stream.
    """
    return _chunk_size(batch * tokens, programs=512, most=32), _options(
        d, per_thread=8, stages=3 if stream == torch.float32 else 2
    )


def _options(d, per_thread, stages):
    """BLOCK is one power of two, masked to D: every access is 16 bytes wide. Nothing depends on the machine.

    STAGES rows are in flight, prefetched to shared memory; long rows would not fit into 99 KB of it.
    """
    block = max(32, triton.next_power_of_2(d))
    warps = min(32, max(1, block // (32 * per_thread)))
    return {"D": d, "BLOCK": block, "STAGES": stages if block <= 2048 else 1, "num_warps": warps, **FUSE}


def _chunk_size(rows: int, programs: int, most: int) -> int:
    size = 1
    while size < most and rows >= 2 * size * programs:
        size *= 2
    return size


@triton.jit
def locate(N, chunk):
    """(program, its sample, its first token) in a grid of B * cdiv(N, chunk) programs, as int64."""
    program = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(N, chunk)
    return program, program // chunks, program % chunks * chunk


@triton.jit
def load_row(pointer, cols, mask):
    return tl.load(pointer + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalize(x, mask, eps, D: tl.constexpr):
    """Mean and 1/sigma of a row, two-pass in float32, and the centred row with zeros beyond D."""
    mean = tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + tl.cast(eps, tl.float32))
    return mean, rstd, centred


@triton.jit
def layer_norm_grad(dh, xhat, scale1, rstd, D: tl.constexpr):
    """Gradient of LN(x) * scale1 + shift by x. All inputs are zero beyond D."""
    g = dh * scale1
    c1 = tl.sum(g, 0) / D
    c2 = tl.sum(g * xhat, 0) / D
    return rstd * (g - c1 - xhat * c2)


@triton.jit
def _sum_partials_kernel(partial, out, count, stride, D, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    outer = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((COUNT, BLOCK), tl.float32)
    for first in range(0, count, COUNT):
        rows = first + tl.arange(0, COUNT)
        mask = (rows < count)[:, None] & (cols < D)[None, :]
        at = rows.to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(partial + outer * stride + at, mask=mask, other=0.0)
    tl.store(out + outer * D + cols, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < D)


def sum_partials(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(outer, count, D) float32, contiguous -> (outer, D) in ``dtype``, added in an order fixed by ``count``."""
    outer, count, d = partial.shape
    if not partial.numel():
        return partial.new_zeros(outer, d, dtype=dtype)
    out = partial.new_empty(outer, d, dtype=dtype)
    rows = min(64, triton.next_power_of_2(count))
    grid = (outer, triton.cdiv(d, 64))
    _sum_partials_kernel[grid](partial, out, count, count * d, d, COUNT=rows, BLOCK=64, num_warps=4, **FUSE)
    return out
