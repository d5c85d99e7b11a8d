"""Shared by the kernels over token rows (B, N, D).

Each program owns a chunk of consecutive tokens of one sample and loops over them with the whole row (D) in
registers, so that the sample's shift, scale and gate are loaded once per chunk. Backward programs accumulate
their sums over tokens in float32 registers and write them once per chunk; kernels/sums.py adds the chunks.

A row is held in two pieces, since Triton's blocks are powers of two: x0 holds the first MAIN columns, x1 the TAIL
after them. The last piece is masked if MAIN + TAIL > D; without a tail x1 is a single zero.
"""

import triton
import triton.language as tl

FUSE = {"enable_fp_fusion": True}  # a * b + c with one rounding; explicit, since Triton's default is changing


# D: (MAIN, TAIL, warps) of forward and of backward: the spill-free forms with the fewest instructions per row.
# Every lane loads at least 8 bytes of a piece, so with two warps the tail of 128 becomes a masked 256.
FORMS = {
    384: ((256, 128, 1), (256, 128, 1)),
    768: ((512, 256, 1), (512, 256, 2)),
    1024: ((1024, 0, 1), (1024, 0, 2)),
    1152: ((1024, 128, 1), (1024, 256, 2)),
    2048: ((2048, 0, 2), (2048, 0, 4)),
}


def forward_options(batch: int, tokens: int, d: int, loads: int) -> tuple[int, dict]:
    """Tokens per program, at most 4 and few enough for about 1024 programs, and the kernel's options.

    ``loads``: number of tensors (B, N, D) that it reads.
    """
    form = FORMS[d][0] if d in FORMS else _masked(d, per_thread=16)
    return _chunk_size(batch * tokens, programs=1024, most=4), _options(d, form, loads, ahead=2)


def backward_options(batch: int, tokens: int, d: int, loads: int) -> tuple[int, dict]:
    """Like `forward_options`, with up to 32 tokens: sums over tokens stay in registers until the program ends."""
    form = FORMS[d][1] if d in FORMS else _masked(d, per_thread=8)
    programs = 1024 if form[2] == 1 else 512
    return _chunk_size(batch * tokens, programs, most=32), _options(d, form, loads, ahead=3)


def jvp_options(batch: int, tokens: int, d: int, loads: int) -> tuple[int, dict]:
    """Like `forward_options`, but with backward's forms, since as many rows are held in registers."""
    form = FORMS[d][1] if d in FORMS else _masked(d, per_thread=8)
    return _chunk_size(batch * tokens, programs=1024, most=4), _options(d, form, loads, ahead=2)


def _masked(d, per_thread):
    """A single power of two, masked to D, for the widest accesses; lanes beyond D idle."""
    block = max(32, triton.next_power_of_2(d))
    return block, 0, min(32, max(1, block // (32 * per_thread)))


def _options(d, form, loads, ahead):
    """Prefetch rows to shared memory, at most ``ahead`` of them: about 12 KB in 16-bit dtypes.

    Several programs share a multiprocessor, which needs about 32 KB in flight. Rows longer than 2048 are not
    prefetched: they would not fit into the 99 KB of some GPUs.
    """
    main, tail, warps = form
    rows = max(1, min(ahead, 12 * 1024 // (loads * 2 * d))) if d <= 2048 else 0
    return {"D": d, "MAIN": main, "TAIL": tail, "STAGES": 1 + rows, "num_warps": warps, **FUSE}


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
def load_piece(at, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    """Columns FIRST to FIRST + COLS in float32, zeros from D on; a single zero if COLS is 0."""
    if COLS == 0:
        piece = tl.zeros((1,), tl.float32)
    elif FIRST + COLS > D:
        cols = FIRST + tl.arange(0, COLS)
        piece = tl.load(at + cols, mask=cols < D, other=0.0).to(tl.float32)
    else:
        piece = tl.load(at + FIRST + tl.arange(0, COLS)).to(tl.float32)
    return piece


@triton.jit
def load_row(at, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The row at ``at``, in two pieces."""
    return load_piece(at, 0, MAIN, D), load_piece(at, MAIN, TAIL, D)


@triton.jit
def load_optional_row(base, offset, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The row at ``base + offset``; zeros if base is None."""
    if base is None:
        row0, row1 = zero_row(MAIN, TAIL)
    else:
        row0, row1 = load_row(base + offset, D, MAIN, TAIL)
    return row0, row1


@triton.jit
def store_piece(at, piece, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    if COLS > 0 and FIRST + COLS > D:
        cols = FIRST + tl.arange(0, COLS)
        tl.store(at + cols, piece.to(at.dtype.element_ty), mask=cols < D)
    elif COLS > 0:
        tl.store(at + FIRST + tl.arange(0, COLS), piece.to(at.dtype.element_ty))


@triton.jit
def store_row(at, x0, x1, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Write a row to ``at``, in its dtype."""
    store_piece(at, x0, 0, MAIN, D)
    store_piece(at, x1, MAIN, TAIL, D)


@triton.jit
def zero_row(MAIN: tl.constexpr, TAIL: tl.constexpr):
    return tl.zeros((MAIN,), tl.float32), tl.zeros((TAIL if TAIL else 1,), tl.float32)


@triton.jit
def centre_piece(piece, mean, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    if COLS > 0:
        piece -= mean
    if FIRST + COLS > D and COLS > 0:
        piece = tl.where(FIRST + tl.arange(0, COLS) < D, piece, 0.0)
    return piece


@triton.jit
def centre(x0, x1, mean, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The row minus its mean, zeros from D on."""
    return centre_piece(x0, mean, 0, MAIN, D), centre_piece(x1, mean, MAIN, TAIL, D)


@triton.jit
def total(x0, x1, TAIL: tl.constexpr):
    """The sum of a row."""
    result = tl.sum(x0, 0)
    if TAIL:
        result += tl.sum(x1, 0)
    return result


@triton.jit
def normalize(x0, x1, eps, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Mean and 1/sigma of a row, two-pass in float32, and the centered row, zero beyond D."""
    mean = total(x0, x1, TAIL) / D
    x0, x1 = centre(x0, x1, mean, D, MAIN, TAIL)
    variance = total(x0 * x0, x1 * x1, TAIL) / D
    return mean, 1.0 / tl.sqrt(variance + tl.cast(eps, tl.float32)), x0, x1


@triton.jit
def layer_norm_grad(dh0, dh1, xhat0, xhat1, scale0, scale1, rstd, D: tl.constexpr, TAIL: tl.constexpr):
    """Gradient of xhat * scale + shift with respect to x, where xhat = LN(x). All rows are zero beyond D."""
    g0, g1 = dh0 * scale0, dh1 * scale1
    c1 = total(g0, g1, TAIL) / D
    c2 = total(g0 * xhat0, g1 * xhat1, TAIL) / D
    return rstd * (g0 - c1 - xhat0 * c2), rstd * (g1 - c1 - xhat1 * c2)


@triton.jit
def layer_norm_tangent(x_t0, x_t1, xhat0, xhat1, rstd, D: tl.constexpr, TAIL: tl.constexpr):
    """Tangent of xhat = LN(x), given the tangent x_t of x. All inputs are zero beyond D; the result is not.

    The mean of x_t is subtracted before the second sum: its factor there, the sum of xhat, is zero up to rounding.
    """
    c1 = total(x_t0, x_t1, TAIL) / D
    x_t0, x_t1 = x_t0 - c1, x_t1 - c1
    c2 = total(x_t0 * xhat0, x_t1 * xhat1, TAIL) / D
    return rstd * (x_t0 - xhat0 * c2), rstd * (x_t1 - xhat1 * c2)
