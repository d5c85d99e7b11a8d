"""patchify, unpatchify, patch_embed: between images (B, C, H, W) and tokens (B, N, D)."""

import math

from ditfast.ops import checks, reference
from ditfast.ops.backend import choose, note


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
    note("patchify", choose("patchify", backend, x.device.type))
    return reference.patchify(x, patch_size, channels_last)


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
    note("unpatchify", choose("unpatchify", backend, tokens.device.type))
    return reference.unpatchify(tokens, patch_size, grid, channels_last)


def patch_embed(x, weight, bias, pos_embed, patch_size: int, *, backend=None):
    """Patches, their projection, bias and position: ``patchify(x) @ weight.T + bias + pos_embed``.

    Args:
        x: (B, C, Hh, Ww) with Hh and Ww multiples of the patch size p.
        weight: (D, C, p, p); bias: (D,).
        pos_embed: (1, N, D) or (N, D), N = (Hh/p) * (Ww/p).
        patch_size: p, in pixels.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D) tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """
    _check_image(x, patch_size)
    _check_projection(x, weight, bias, pos_embed, patch_size)
    note("patch_embed", choose("patch_embed", backend, x.device.type))
    return reference.patch_embed(x, weight, bias, pos_embed, patch_size)


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
    if len(grid) != 2 or grid[0] * grid[1] != n:
        raise ValueError(f"grid must be (rows, columns) with rows * columns = N = {n}, got {tuple(grid)}")
    return tuple(grid)
