"""A checkpoint's position embedding: check for sines and cosines, and adapt to another grid."""

import torch

from ditfast.models.embed import get_2d_sincos_pos_embed


def sincos(hidden_size: int, grid: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The original's embedding: (1, N, D)."""
    return torch.from_numpy(get_2d_sincos_pos_embed(hidden_size, grid)).to(dtype).unsqueeze(0)


def is_sincos(stored: torch.Tensor, grid: tuple[int, int]) -> bool:
    """Whether the stored embedding is the original's, up to the rounding of its dtype."""
    if not stored.is_floating_point():
        return False
    computed = sincos(stored.shape[-1], grid, stored.dtype)
    atol = max(1e-4, 2 * torch.finfo(stored.dtype).eps)
    return stored.shape == computed.shape and torch.allclose(stored, computed, rtol=0, atol=atol)


def regrid(stored: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """The embedding for the grid ``new``: the stored one if it fits, else new sines and cosines.

    Raises:
        ValueError: the stored one, for the grid ``old``, is not sines and cosines, and cannot be extended.
    """
    if old == new or is_sincos(stored, new):
        return stored
    if not is_sincos(stored, old):
        raise ValueError(f"pos_embed must be the sines and cosines of a {old} grid to be adapted to {new}")
    return sincos(stored.shape[-1], new, stored.dtype)
