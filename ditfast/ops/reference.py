"""The ground truth: every operation in plain PyTorch.

Shapes: B batch, N tokens, D hidden size, H heads, d head dim, C channels, p patch size. Modulation tensors
(shift, scale, gate) are (B, D), one row per sample, or (B, N, D), one row per token.

These functions define what every other backend must compute. They run on any device and dtype, are
differentiable any number of times, and import nothing from the rest of the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_token(modulation):
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation  # (B, 1 or N, D)


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    h = F.layer_norm(x, (int(x.shape[-1]),), eps=eps)  # (B, N, D)
    h = h * (1 + _per_token(scale)) + _per_token(shift)
    return h.to(out_dtype or x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (x + _per_token(gate) * y).to(x.dtype)  # (B, N, D)


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    x = gated_residual(x, y, gate, bias)
    return x, layer_norm_modulate(x, shift, scale, eps, out_dtype)


def mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None = None) -> Tensor:
    a = F.gelu(F.linear(h, w1, b1), approximate="tanh")  # (B, N, 4D)
    return F.linear(a, w2, b2)  # (B, N, D)


def attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    b, n, width = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, num_heads, width // (3 * num_heads))).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = torch.softmax((q * scale) @ k.transpose(-2, -1), dim=-1)  # (B, H, N, N)
    return (p @ v).transpose(1, 2).reshape(b, n, width // 3)  # (B, N, H*d)


def patchify(x: Tensor, patch_size: int, channels_last: bool = False) -> Tensor:
    b, c, height, width = x.shape
    p = patch_size
    x = x.reshape(b, c, height // p, p, width // p, p)  # (B, C, gh, p, gw, p)
    x = x.permute(0, 2, 4, 3, 5, 1) if channels_last else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (height // p) * (width // p), c * p * p)  # (B, N, C*p*p)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int], channels_last: bool = True) -> Tensor:
    (b, _, width), (gh, gw), p = tokens.shape, grid, patch_size
    c = width // (p * p)
    if channels_last:
        x = tokens.reshape(b, gh, gw, p, p, c).permute(0, 5, 1, 3, 2, 4)  # (B, C, gh, p, gw, p)
    else:
        x = tokens.reshape(b, gh, gw, c, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, gh * p, gw * p)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor, patch_size: int) -> Tensor:
    x = F.conv2d(x, weight, bias, stride=patch_size)  # (B, D, gh, gw)
    return x.flatten(2).transpose(1, 2) + pos_embed  # (B, N, D)
