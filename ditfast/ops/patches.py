"""patchify, unpatchify, patch_embed: between images (B, C, H, W) and tokens (B, N, D)."""

import math

import torch

from ditfast.ops import checks, reference
from ditfast.ops.backend import DTYPES, choose, note, resolve
from ditfast.ops.extension import unit_stride
from ditfast.ops.registration import define, differentiable, reject_double_backward, run
from ditfast.ops.rows import linear_dtype


def patchify(x, patch_size: int, channels_last: bool = False, *, backend=None):
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
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """
    _check_image(x, patch_size)
    name = choose("patchify", backend, x.device.type, _unsupported(x))
    if name == "reference":
        note("patchify", name)
        return reference.patchify(x, patch_size, channels_last)
    return _patchify_call(x, patch_size, channels_last, name)


def unpatchify(
    tokens, patch_size: int, grid: tuple[int, int] | None = None, channels_last: bool = True, *, backend=None
):
    """Put patches together again: the inverse of `patchify`.

    Args:
        tokens: (B, N, C*p*p).
        patch_size: p, in pixels.
        grid: (Hh/p, Ww/p) with product N; None for a square.
        channels_last: the order inside a patch, as in `patchify`; the original's final layer is channels_last.
        backend: see `ditfast.ops`.

    Returns:
        (B, C, Hh, Ww).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape; N is no square and grid is None.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "Transformer decoder".
    """
    grid = _check_tokens(tokens, patch_size, grid)
    name = choose("unpatchify", backend, tokens.device.type, _unsupported(tokens))
    if name == "reference":
        note("unpatchify", name)
        return reference.unpatchify(tokens, patch_size, grid, channels_last)
    return _unpatchify_call(tokens, patch_size, *grid, channels_last, name)


def patch_embed(x, weight, bias, pos_embed, patch_size: int, *, backend=None):
    """Patches, their projection, bias and position: ``patchify(x) @ weight.T + bias + pos_embed``.

    Args:
        x: (B, C, Hh, Ww) with Hh and Ww multiples of the patch size p.
        weight: (D, C, p, p); bias: (D,).
        pos_embed: (1, N, D) or (N, D), N = (Hh/p) * (Ww/p).
        patch_size: p, in pixels.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D) in the dtype of the projection (autocast's, where it is on) promoted with pos_embed's: the residual
        stream stays float32 under autocast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """
    _check_image(x, patch_size)
    _check_projection(x, weight, bias, pos_embed, patch_size)
    name = choose("patch_embed", backend, x.device.type, _unsupported(x, weight, bias, pos_embed))
    if name == "reference":
        note("patch_embed", name)
        return reference.patch_embed(x, weight, bias, pos_embed, patch_size)
    dtype = linear_dtype(x)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))  # as autocast would, where autograd sees it
    pos = pos_embed.reshape(pos_embed.shape[-2:])
    out_dtype = torch.promote_types(dtype, pos.dtype)
    return _embed_call(x, weight.flatten(1), bias, pos, patch_size, out_dtype, name)


def _check_image(x, patch_size):
    checks.positive("patch_size", patch_size)
    checks.tensor("x", x)
    checks.rank("x", x, "(B, C, H, W)", 4)
    if x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(f"x must have H and W divisible by patch_size={patch_size}, got shape {tuple(x.shape)}")


def _check_projection(x, weight, bias, pos_embed, patch_size):
    p, n = patch_size, (x.shape[2] // patch_size) * (x.shape[3] // patch_size)
    checks.tensor("weight", weight, x)
    checks.rank("weight", weight, "(D, C, p, p)", 4)
    d = weight.shape[0]
    checks.shape("weight", weight, "(D, C, p, p)", (d, x.shape[1], p, p))
    checks.tensor("bias", bias, x)
    checks.shape("bias", bias, "(D,)", (d,))
    checks.tensor("pos_embed", pos_embed, x)
    if pos_embed.dim() == 3:
        checks.shape("pos_embed", pos_embed, "(1, N, D)", (1, n, d))
    else:
        checks.shape("pos_embed", pos_embed, "(N, D)", (n, d))


def _check_tokens(tokens, patch_size, grid):
    checks.positive("patch_size", patch_size)
    checks.tokens("tokens", tokens)
    n, width = tokens.shape[1:]
    if width % (patch_size * patch_size):
        raise ValueError(f"tokens must have a last size divisible by patch_size**2={patch_size**2}, got {width}")
    if grid is None:
        side = math.isqrt(n)
        if side * side != n:
            raise ValueError(f"grid must be given for N={n} tokens, which is no square")
        return side, side
    if not _is_grid(grid) or grid[0] * grid[1] != n:
        raise ValueError(f"grid must be (rows, columns) with rows * columns = N = {n}, got {grid!r}")
    return tuple(grid)


def _is_grid(grid):
    return isinstance(grid, tuple | list) and len(grid) == 2 and all(isinstance(g, int) and g > 0 for g in grid)


def _unsupported(*tensors):
    for t in tensors:
        if t.dtype not in DTYPES:
            return f"the kernels take float32, float16 and bfloat16, got {t.dtype}"
    return None


def _kernels(op, backend, stream, branch, width):
    """The module of Triton kernels, or None where the running operation takes the reference."""
    if resolve(op, backend, stream, branch, width) != "triton":
        return None
    from ditfast.kernels import patches

    return patches


def _patchify(x, patch_size, channels_last, backend):
    if kernels := _kernels("patchify", backend, x, x, x.shape[1] * patch_size * patch_size):
        return kernels.patchify(x, patch_size, channels_last)
    return reference.patchify(x, patch_size, channels_last).clone(memory_format=torch.contiguous_format)


def _patchify_fake(x, patch_size, channels_last, backend):
    b, c, height, width = x.shape
    p = patch_size
    return x.new_empty(b, (height // p) * (width // p), c * p * p)


def _unpatchify(tokens, patch_size, grid_h, grid_w, channels_last, backend):
    if kernels := _kernels("unpatchify", backend, tokens, tokens, tokens.shape[2]):
        return kernels.unpatchify(tokens, patch_size, grid_h, grid_w, channels_last)
    image = reference.unpatchify(tokens, patch_size, (grid_h, grid_w), channels_last)
    return image.clone(memory_format=torch.contiguous_format)


def _unpatchify_fake(tokens, patch_size, grid_h, grid_w, channels_last, backend):
    p = patch_size
    return tokens.new_empty(tokens.shape[0], tokens.shape[2] // (p * p), grid_h * p, grid_w * p)


def _embed(x, weight, bias, pos, patch_size, out_dtype, backend):
    if kernels := _kernels("patch_embed", backend, pos, x, weight.shape[1]):
        return kernels.patch_embed(x, weight.contiguous(), unit_stride(bias), unit_stride(pos), patch_size, out_dtype)
    tokens = torch.nn.functional.linear(reference.patchify(x, patch_size), weight, bias)
    return (tokens + pos).to(out_dtype)


def _embed_fake(x, weight, bias, pos, patch_size, out_dtype, backend):
    p = patch_size
    n = (x.shape[2] // p) * (x.shape[3] // p)
    return x.new_empty(x.shape[0], n, weight.shape[0], dtype=out_dtype)


def _embed_backward(dout, x, weight, patch_size, needs, backend):
    """Once per model: GEMMs of the library around the patch kernels."""
    (b, n, d), empty = dout.shape, x.new_empty(0)
    rows = dout.to(x.dtype).reshape(-1, d)  # (B*N, D)
    dx = dweight = empty
    if needs[0]:
        grid = x.shape[2] // patch_size, x.shape[3] // patch_size
        dx = _unpatchify((rows @ weight).view(b, n, weight.shape[1]), patch_size, *grid, False, backend)
    if needs[1]:
        patches = _patchify(x, patch_size, False, backend)
        dweight = rows.t() @ patches.view(-1, weight.shape[1])
    dbias = dout.sum((0, 1), dtype=torch.float32).to(x.dtype) if needs[2] else empty
    dpos = dout.sum(0, dtype=torch.float32).to(dout.dtype) if needs[3] else dout.new_empty(0)
    return dx, dweight, dbias, dpos


def _embed_backward_fake(dout, x, weight, patch_size, needs, backend):
    shapes = ((x, x.shape), (x, weight.shape), (x, weight.shape[:1]), (dout, dout.shape[1:]))
    return tuple(t.new_empty(shape if n else (0,)) for (t, shape), n in zip(shapes, needs, strict=True))


_patchify_op = define(
    "patchify(Tensor x, int patch_size, bool channels_last, str backend) -> Tensor", _patchify, _patchify_fake
)
_unpatchify_op = define(
    "unpatchify(Tensor tokens, int patch_size, int grid_h, int grid_w, bool channels_last, str backend) -> Tensor",
    _unpatchify,
    _unpatchify_fake,
)
_embed_op = define(
    "patch_embed(Tensor x, Tensor weight, Tensor bias, Tensor pos, int patch_size, ScalarType out_dtype, str backend)"
    " -> Tensor",
    _embed,
    _embed_fake,
)
_embed_backward_op = define(
    "patch_embed_backward(Tensor dout, Tensor x, Tensor weight, int patch_size, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _embed_backward,
    _embed_backward_fake,
)


def _patchify_context(ctx, inputs, output):
    x, ctx.patch_size, ctx.channels_last, ctx.backend = inputs
    ctx.grid = x.shape[2] // ctx.patch_size, x.shape[3] // ctx.patch_size


def _patchify_backward(ctx, dout):
    return run(_unpatchify_op, dout, ctx.patch_size, *ctx.grid, ctx.channels_last, ctx.backend), None, None, None


def _unpatchify_context(ctx, inputs, output):
    _, ctx.patch_size, _, _, ctx.channels_last, ctx.backend = inputs


def _unpatchify_backward(ctx, dout):
    return run(_patchify_op, dout, ctx.patch_size, ctx.channels_last, ctx.backend), None, None, None, None, None


def _embed_context(ctx, inputs, output):
    x, weight, _, _, ctx.patch_size, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _embed_autograd(ctx, dout):
    needs = list(ctx.needs_input_grad[:4])
    grads = run(_embed_backward_op, dout, *ctx.saved_tensors, ctx.patch_size, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


_patchify_call = differentiable("patchify", _patchify_op, _patchify_context, _patchify_backward)
_unpatchify_call = differentiable("unpatchify", _unpatchify_op, _unpatchify_context, _unpatchify_backward)
reject_double_backward("patch_embed", _embed_backward_op)
_embed_call = differentiable("patch_embed", _embed_op, _embed_context, _embed_autograd)
