"""patchify, unpatchify: between images (B, C, H, W) and patch tokens (B, N, C*p*p). Each is the other's gradient."""

import math

import torch
from torch import Tensor

from ditfast.ops import checks, host, reference
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import device_type, why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.op import WITHOUT_STREAM, Backend, Op, RandomTensors, no_products
from ditfast.ops.registration import attach_autograd, register_op, run_in_backward


def patchify(x: Tensor, patch_size: int, channels_last: bool = False, *, backend: Backend = None) -> Tensor:
    """Cut images into patches, row by row.

    Args:
        x: (B, C, Hh, Ww) with Hh and Ww multiples of the patch size p.
        patch_size: p, in pixels.
        channels_last: the order inside a patch: (c, ph, pw), as in a conv weight, or (ph, pw, c).
        backend: see `ditfast.ops`.

    Returns:
        (B, N, C*p*p), N = (Hh/p) * (Ww/p).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """
    check_image(x, patch_size)

    def takes_host(is_able):
        return on_cpu.takes_host(PATCHIFY, x.dtype, x.dtype, x.shape[1] * patch_size * patch_size, x.numel(), is_able)

    name = choose(PATCHIFY, backend, device_type(x), why_not_dtype(x), takes_host)
    if name == "reference":
        note(PATCHIFY.name, name)
        return reference.patchify(x, patch_size, channels_last)
    return _patchify_call(x, patch_size, channels_last, name)


def unpatchify(
    tokens: Tensor,
    patch_size: int,
    grid: tuple[int, int] | None = None,
    channels_last: bool = True,
    *,
    backend: Backend = None,
) -> Tensor:
    """Reassemble images from patches: the inverse of `patchify`.

    Args:
        tokens: (B, N, C*p*p).
        patch_size: p, in pixels.
        grid: (Hh/p, Ww/p) with product N; None for a square.
        channels_last: the order inside a patch, as in `patchify`; the original's final layer is channels_last.
        backend: see `ditfast.ops`.

    Returns:
        (B, C, Hh, Ww).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape; grid is None and N is not a square.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "Transformer decoder".
    """
    grid = _check_tokens(tokens, patch_size, grid)

    def takes_host(is_able):
        return on_cpu.takes_host(UNPATCHIFY, tokens.dtype, tokens.dtype, tokens.shape[2], tokens.numel(), is_able)

    name = choose(UNPATCHIFY, backend, device_type(tokens), why_not_dtype(tokens), takes_host)
    if name == "reference":
        note(UNPATCHIFY.name, name)
        return reference.unpatchify(tokens, patch_size, grid, channels_last)
    return _unpatchify_call(tokens, patch_size, *grid, channels_last, name)


def check_image(x: Tensor, patch_size: int) -> None:
    """Require (B, C, H, W) with H and W divisible by the patch size."""
    checks.positive("patch_size", patch_size)
    checks.ranked("x", x, "(B, C, H, W)", 4)
    if x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(f"x must have H and W divisible by patch_size={patch_size}, got shape {tuple(x.shape)}")


def _check_tokens(tokens, patch_size, grid):
    checks.positive("patch_size", patch_size)
    _, n, width = checks.tokens("tokens", tokens)
    if width % (patch_size * patch_size):
        raise ValueError(f"tokens must have a last size divisible by patch_size**2={patch_size**2}, got {width}")
    if grid is None:
        side = math.isqrt(n)
        if side * side != n:
            raise ValueError(f"grid must be given for N={n} tokens, which is not a perfect square")
        return side, side
    if not _is_grid(grid) or grid[0] * grid[1] != n:
        raise ValueError(f"grid must be (rows, columns) with rows * columns = N = {n}, got {grid!r}")
    return tuple(grid)


def _is_grid(grid):
    # torch 2.7 does not trace isinstance of a union
    return isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(g, int) and g > 0 for g in grid)


def run_patchify(x: Tensor, patch_size: int, channels_last: bool, backend: str) -> Tensor:
    """`patchify` inside a running operation."""
    check_image(x, patch_size)
    name = resolve(PATCHIFY, backend, x, x, x.shape[1] * patch_size * patch_size)
    if name == "triton":
        from ditfast.kernels import patches as kernels

        return kernels.patchify(x, patch_size, channels_last)
    if name == "host":
        return host.patchify(x, patch_size, channels_last)
    return reference.patchify(x, patch_size, channels_last).clone(memory_format=torch.contiguous_format)


def _patchify_fake(x, patch_size, channels_last, backend):
    b, c, height, width = x.shape
    p = patch_size
    return x.new_empty(b, (height // p) * (width // p), c * p * p)


def run_unpatchify(
    tokens: Tensor, patch_size: int, grid_h: int, grid_w: int, channels_last: bool, backend: str
) -> Tensor:
    """`unpatchify` inside a running operation."""
    for name, value in (("patch_size", patch_size), ("grid_h", grid_h), ("grid_w", grid_w)):
        checks.positive(name, value)
    if tokens.shape[1] != grid_h * grid_w or tokens.shape[2] % patch_size**2:
        raise ValueError(
            f"unpatchify: tokens must have shape (B, {grid_h * grid_w}, C*{patch_size}*{patch_size}), "
            f"got {tuple(tokens.shape)}"
        )
    name = resolve(UNPATCHIFY, backend, tokens, tokens, tokens.shape[2])
    if name == "triton":
        from ditfast.kernels import patches as kernels

        return kernels.unpatchify(tokens, patch_size, grid_h, grid_w, channels_last)
    if name == "host":
        return host.unpatchify(tokens, patch_size, grid_h, grid_w, channels_last)
    image = reference.unpatchify(tokens, patch_size, (grid_h, grid_w), channels_last)
    return image.clone(memory_format=torch.contiguous_format)


def _unpatchify_fake(tokens, patch_size, grid_h, grid_w, channels_last, backend):
    p = patch_size
    return tokens.new_empty(tokens.shape[0], tokens.shape[2] // (p * p), grid_h * p, grid_w * p)


_patchify_op = register_op(
    "patchify(Tensor x, int patch_size, bool channels_last, str backend) -> Tensor",
    run_patchify,
    _patchify_fake,
    {"x": "B,C,I,J"},
    sample_dims=(0,),
)
_unpatchify_op = register_op(
    "unpatchify(Tensor tokens, int patch_size, int grid_h, int grid_w, bool channels_last, str backend) -> Tensor",
    run_unpatchify,
    _unpatchify_fake,
    {"tokens": "B,N,W"},
    sample_dims=(0,),
)


def _patchify_context(ctx, inputs, output):
    x, ctx.patch_size, ctx.channels_last, ctx.backend = inputs
    ctx.grid = x.shape[2] // ctx.patch_size, x.shape[3] // ctx.patch_size


def _patchify_backward(ctx, dout):
    return (
        run_in_backward(_unpatchify_op, dout, ctx.patch_size, *ctx.grid, ctx.channels_last, ctx.backend),
        None,
        None,
        None,
    )


def _unpatchify_context(ctx, inputs, output):
    _, ctx.patch_size, _, _, ctx.channels_last, ctx.backend = inputs


def _unpatchify_backward(ctx, dout):
    return (
        run_in_backward(_patchify_op, dout, ctx.patch_size, ctx.channels_last, ctx.backend),
        None,
        None,
        None,
        None,
        None,
    )


def _patchify_jvp(args, tangents):  # linear
    return _patchify_call(*args), (_patchify_call(*tangents, *args[1:]),)


def _unpatchify_jvp(args, tangents):
    return _unpatchify_call(*args), (_unpatchify_call(*tangents, *args[1:]),)


_patchify_call = attach_autograd("patchify", _patchify_op, _patchify_context, _patchify_backward, _patchify_jvp)
_unpatchify_call = attach_autograd(
    "unpatchify", _unpatchify_op, _unpatchify_context, _unpatchify_backward, _unpatchify_jvp
)

CHANNELS, PATCH = 4, 2  # of test problems: those of DiT-XL/2


def widths(hidden_size: int) -> tuple[int, ...]:
    """Elements per patch in the paper's models, without and with a predicted variance."""
    return tuple(channels * p * p for channels in (CHANNELS, 2 * CHANNELS) for p in (2, 4, 8))


def patch_of(width: int) -> tuple[int, int]:
    """Channels and patch size of a patch with ``width`` elements."""
    p = next(p for p in (8, 4, 2, 1) if width % (p * p) == 0 and (width // (p * p) >= 3 or p == 1))
    return width // (p * p), p


def image_of(t: RandomTensors, batch: int, tokens: int) -> Tensor:
    """An image (B, C, H, W) with ``tokens`` patches, a square number."""
    side = PATCH * math.isqrt(tokens)
    return t(batch, CHANNELS, side, side)


def _patchify_arguments(t, batch, tokens, dim):
    return {"x": image_of(t, batch, tokens), "patch_size": PATCH}


def _unpatchify_arguments(t, batch, tokens, dim):
    return {"tokens": t(batch, tokens, 2 * CHANNELS * PATCH * PATCH), "patch_size": PATCH}  # noise and variance


def _patchify_self_check(t, width, backend):
    channels, p = patch_of(width)
    x = t(t.size[0], channels, 6 * p, 4 * p)
    return {f"tokens (channels_last={last})": run_patchify(x, p, last, backend) for last in (False, True)}


def _unpatchify_self_check(t, width, backend):
    _, p = patch_of(width)
    tokens = t(t.size[0], 24, width)
    return {f"image (channels_last={last})": run_unpatchify(tokens, p, 6, 4, last, backend) for last in (False, True)}


PATCHIFY = Op(
    name="patchify",
    function=patchify,
    backends={"triton": WITHOUT_STREAM, "host": WITHOUT_STREAM, "reference": WITHOUT_STREAM},
    arguments=_patchify_arguments,
    outputs=("tokens",),
    self_check=_patchify_self_check,
    auto_precisions=WITHOUT_STREAM,
    widths=widths,
    flops={"patchify": no_products},
    moved={"fwd": ("x", "tokens"), "bwd": ("dtokens", "dx")},
)
UNPATCHIFY = Op(
    name="unpatchify",
    function=unpatchify,
    backends={"triton": WITHOUT_STREAM, "host": WITHOUT_STREAM, "reference": WITHOUT_STREAM},
    arguments=_unpatchify_arguments,
    outputs=("image",),
    self_check=_unpatchify_self_check,
    auto_precisions=WITHOUT_STREAM,
    widths=widths,
    flops={"unpatchify": no_products},
    moved={"fwd": ("tokens", "image"), "bwd": ("dimage", "dtokens")},
)
