"""The inputs of a DiT as vectors: patches with their position, the timestep, the class label."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ditfast.models.limits import check_tensors
from ditfast.models.linears import call_linears
from ditfast.models.plain import has_original_forward, is_plain, remember_forward


@remember_forward
class PatchEmbed(nn.Module):
    """Patches of an image, each projected to a token: (B, C, Hh, Ww) -> (B, N, D), N = (Hh/p) * (Ww/p).

    Args:
        img_size: (Hh, Ww) in latent pixels, or one number for a square.
        patch_size: p; must divide both.
        in_chans: C.
        embed_dim: D.
        bias: whether the projection has a bias.

    Raises:
        ValueError: p does not divide the height or the width.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
    ):
        super().__init__()
        height, width = _both_sides(img_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size must divide input_size={img_size}, got {patch_size}")
        self.img_size = (height, width)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


@remember_forward
class TimestepEmbedder(nn.Module):
    """Embed timesteps, integer or fractional: (B,) -> (B, D).

    Args:
        hidden_size: D.
        frequency_embedding_size: number of sinusoids.
        freq_shift: see `timestep_embedding`.

    Source: Peebles & Xie, section 3.2; Vaswani et al., "Attention Is All You Need", section 3.5.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256, freq_shift: float = 0):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size
        self.freq_shift = freq_shift

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000, freq_shift: float = 0) -> Tensor:
        """Cosines, then sines, of t at dim // 2 frequencies from 1 to almost 1 / max_period: (B, dim) float32.

        With ``freq_shift=1`` the last frequency is 1 / max_period itself, as in diffusers' DiT.
        """
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(max_period) * steps / (half - freq_shift))  # (dim // 2,)
        angles = t[:, None].float() * frequencies[None]  # (B, dim // 2)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return nn.functional.pad(embedding, (0, dim % 2))

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``dtype`` is the MLP's compute dtype; it is used only if the first layer is not a plain Linear."""
        size, shift = self.frequency_embedding_size, self.freq_shift
        frequencies = self.timestep_embedding(t, size, freq_shift=shift)  # (B, 256)
        return call_linears(self.mlp, frequencies.to(self._input_dtype(dtype)))  # (B, D)

    def _input_dtype(self, dtype):
        """A plain Linear's weight dtype; for others, which may compute in another, ``dtype`` or a guess."""
        first = self.mlp[0] if isinstance(self.mlp, nn.Sequential) else self.mlp
        if is_plain(first, nn.Linear):
            return first.weight.dtype
        wide = (p.dtype for p in self.mlp.parameters() if p.is_floating_point() and p.element_size() > 1)
        return dtype or next(wide, torch.float32)


def embed_times(
    t_embedder: nn.Module, r_embedder: nn.Module | None, t: Tensor, r: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Embed t, and add the embedding of r - t (0 without r) if there is an embedder for it: (B or 1, D)."""
    if r_embedder is None:
        return _embed_time(t_embedder, t, dtype)
    stretch = torch.zeros_like(t) if r is None else r - t
    return _embed_time(t_embedder, t, dtype) + _embed_time(r_embedder, stretch, dtype)


def _embed_time(embedder, t, dtype):
    """Call a timestep embedder, which may not be ours."""
    return embedder(t, dtype=dtype) if has_original_forward(embedder, TimestepEmbedder) else embedder(t)


@remember_forward
class LabelEmbedder(nn.Module):
    """Embed class labels, dropped at random for classifier-free guidance: (B,) -> (B, D).

    Args:
        num_classes: K; the null label is K.
        hidden_size: D.
        dropout_prob: probability that training replaces a label by the null label; 0 for no null label.

    Raises:
        IndexError: a label is outside the table (on the CPU; on a GPU, PyTorch's own assertion fails).

    Source: Peebles & Xie, section 3.1, "Classifier-free guidance"; Ho & Salimans, "Classifier-Free Diffusion
    Guidance", section 3.2.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def token_drop(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        """Replace labels by the null label: at random, or where ``force_drop_ids`` (B,) is 1."""
        if force_drop_ids is None:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            dropped = force_drop_ids == 1
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels: Tensor, train: bool, force_drop_ids: Tensor | None = None) -> Tensor:
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        try:
            return self.embedding_table(labels)  # (B, D)
        except IndexError as error:
            last = self.embedding_table.num_embeddings - 1
            raise IndexError(
                f"y must be in [0, {last}], got values from {int(labels.min())} to {int(labels.max())}"
            ) from error


def is_patch_projection(proj: Any, patch_size: int) -> bool:
    """Whether ``proj`` is a plain convolution that projects patches, with a bias."""
    if not is_plain(proj, nn.Conv2d) or proj.bias is None:
        return False
    square = (patch_size, patch_size)
    dense = proj.groups == 1 and proj.dilation == (1, 1) and proj.padding in ((0, 0), "valid")
    return dense and tuple(proj.kernel_size) == tuple(proj.stride) == square


def check_latents(embedder: PatchEmbed, x: Any) -> None:
    """Raise if the shape of x does not fit the embedder, or its dtype does not fit a plain projection's weight."""
    (height, width), proj = embedder.img_size, embedder.proj
    check_tensors(x=x)
    c = getattr(proj, "in_channels", None)  # unknown if the convolution was replaced
    if x.dim() != 4 or tuple(x.shape[1:]) != (x.shape[1] if c is None else c, height, width):
        raise ValueError(f"x must have shape (B, C, S, S) = (B, {c or 'C'}, {height}, {width}), got {tuple(x.shape)}")
    if is_plain(proj, nn.Conv2d) and x.dtype != proj.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must have the model's dtype {proj.weight.dtype} outside autocast, got {x.dtype}")


def check_timesteps(t: Any, x: Tensor, name: str = "t") -> None:
    """Raise unless t, called ``name``, holds one number per sample of x, or one for all."""
    _check_per_sample(name, t, x)
    if t.dtype == torch.bool or t.is_complex():
        raise TypeError(f"{name} must be floating-point or integer, got {t.dtype}")


def check_stretch(r_embedder: nn.Module | None, r: Any, x: Tensor) -> None:
    """Raise if r is given to a model without an embedder for it, or is not as required of t."""
    if r is not None and r_embedder is None:
        raise ValueError("r must be None for a model with second_time=False")
    if r is not None and r_embedder is not None and is_plain(r_embedder, TimestepEmbedder):
        check_timesteps(r, x, "r")


def check_labels(y: Any, x: Tensor) -> None:
    """Raise unless y holds one label per sample of x, or one for all."""
    _check_per_sample("y", y, x)
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y must be int64 or int32, got {y.dtype}")


def _check_per_sample(name, value, x):
    check_tensors(**{name: value})
    if tuple(value.shape) not in ((x.shape[0],), (1,)):
        raise ValueError(f"{name} must have shape (B,) = ({x.shape[0]},), got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def _both_sides(size) -> tuple[int, int]:
    return (size, size) if np.ndim(size) == 0 else size


def get_2d_sincos_pos_embed(
    embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False, extra_tokens: int = 0
) -> np.ndarray:
    """Sine-cosine position embedding of every patch of a grid, row by row: float64 (N, embed_dim).

    ``grid_size`` is (rows, columns) with product N, or one number for a square. The first half of the channels
    encodes the column, the second the row. With ``cls_token``, ``extra_tokens`` rows of zeros come first.
    """
    rows, columns = _both_sides(grid_size)
    along = (np.arange(size, dtype=np.float32) for size in (columns, rows))
    grid = np.stack(np.meshgrid(*along))  # (2, rows, columns): the column, then the row
    embed = get_2d_sincos_pos_embed_from_grid(embed_dim, grid)
    if cls_token and extra_tokens > 0:
        embed = np.concatenate([np.zeros([extra_tokens, embed_dim]), embed])
    return embed


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """Position embedding from two arrays of M coordinates, one per half of the channels: float64 (M, embed_dim)."""
    if embed_dim % 2:
        raise ValueError(f"embed_dim must be even, got {embed_dim}")
    halves = [get_1d_sincos_pos_embed_from_grid(embed_dim // 2, grid[axis]) for axis in (0, 1)]
    return np.concatenate(halves, axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of M coordinates ``pos`` at embed_dim / 2 frequencies: float64 (M, embed_dim).

    Source: Vaswani et al., "Attention Is All You Need", section 3.5.
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim must be even, got {embed_dim}")
    half = embed_dim // 2
    frequencies = 10000.0 ** -(np.arange(half, dtype=np.float64) / half)  # (embed_dim / 2,)
    angles = np.outer(np.reshape(pos, -1), frequencies)  # (M, embed_dim / 2)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
