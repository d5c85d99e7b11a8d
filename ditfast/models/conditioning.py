"""The paper's other ways to condition on timestep and class, and the table of all four.

Attention and MLP are those of the adaLN-Zero block; branches are added without a gate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ditfast.models.blocks import Attention, DiTBlock, FinalLayer, Mlp, call_branch
from ditfast.models.carry import norm_modulate, one_per_sample, split_rows
from ditfast.models.linears import call_linears
from ditfast.models.plain import has_original_forward, reject_symbolic, remember_forward
from ditfast.ops.backends.choice import names_in_force
from ditfast.ops.sdpa import sdpa
from ditfast.suggest import did_you_mean


@remember_forward
class AdaLNBlock(nn.Module):
    """A transformer block with adaptive LayerNorm and no gates: (B, N, D), (B, D) -> (B, N, D).

    Args:
        hidden_size: D.
        num_heads: attention heads; must divide D.
        mlp_ratio: width of the MLP over D.

    Raises:
        ValueError: num_heads does not divide D.

    Source: Peebles & Xie, section 3.2, "Adaptive layer norm (adaLN) block".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size))

    @property
    def is_native(self) -> bool:
        """Whether the block runs the package's own forward."""
        return has_original_forward(self, AdaLNBlock)

    def forward(self, x: Tensor, c: Tensor, backends: tuple[str, ...] | None = None) -> Tensor:
        reject_symbolic(x)
        backends = backends or names_in_force()
        rows = split_rows(call_linears(self.adaLN_modulation, c), 4, x)
        shift_msa, scale_msa, shift_mlp, scale_mlp = rows  # (B, D) each
        x = x + call_branch(self.attn, norm_modulate(self.norm1, x, shift_msa, scale_msa, backends), backends)
        return x + call_branch(self.mlp, norm_modulate(self.norm2, x, shift_mlp, scale_mlp, backends), backends)


@remember_forward
class InContextBlock(nn.Module):
    """A plain transformer block; two of its tokens are the conditioning: (B, N + 2, D) -> (B, N + 2, D).

    Args:
        hidden_size: D.
        num_heads: attention heads; must divide D.
        mlp_ratio: width of the MLP over D.

    Raises:
        ValueError: num_heads does not divide D.

    Source: Peebles & Xie, section 3.2, "In-context conditioning".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    @property
    def is_native(self) -> bool:
        """Whether the block runs the package's own forward."""
        return has_original_forward(self, InContextBlock)

    def forward(self, x: Tensor, c: Tensor | None = None, backends: tuple[str, ...] | None = None) -> Tensor:
        reject_symbolic(x)
        backends = backends or names_in_force()
        x = x + call_branch(self.attn, self.norm1(x), backends)
        return x + call_branch(self.mlp, self.norm2(x), backends)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens over M vectors: (B, N, D), (B, M, D) -> (B, N, D).

    Args:
        dim: D.
        num_heads: H; must divide D.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q = call_linears(self.q, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
        k, v = call_linears(self.kv, c).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, M, d)
        out = sdpa(q, k, v)  # (B, H, N, d)
        return call_linears(self.proj, out.transpose(1, 2).flatten(2))  # (B, N, D)


@remember_forward
class CrossAttentionBlock(nn.Module):
    """Self-attention, then cross-attention to timestep and class, then an MLP: (B, N, D), (B, 2, D) -> (B, N, D).

    Args:
        hidden_size: D.
        num_heads: heads of both attentions; must divide D.
        mlp_ratio: width of the MLP over D.

    Raises:
        ValueError: num_heads does not divide D.

    Source: Peebles & Xie, section 3.2, "Cross-attention block".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    @property
    def is_native(self) -> bool:
        """Whether the block runs the package's own forward."""
        return has_original_forward(self, CrossAttentionBlock)

    def forward(self, x: Tensor, c: Tensor, backends: tuple[str, ...] | None = None) -> Tensor:
        reject_symbolic(x)
        backends = backends or names_in_force()
        x = x + call_branch(self.attn, self.norm1(x), backends)
        x = x + self.cross_attn(self.norm_cross(x), one_per_sample(c, x))
        return x + call_branch(self.mlp, self.norm2(x), backends)


class PlainFinalLayer(nn.Module):
    """LayerNorm and a Linear from tokens to patches: (B, N, D) -> (B, N, p*p*C).

    Args:
        hidden_size: D.
        patch_size: p, in pixels of the latent.
        out_channels: C.

    Source: Peebles & Xie, section 3.2, "Transformer decoder": the LayerNorm is adaptive only with adaLN.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        return call_linears(self.linear, self.norm_final(x))


def _sum_embeddings(x, t, y):
    return x, t + y


def _stack_embeddings(x, t, y):
    return x, torch.stack([one_per_sample(t, x), one_per_sample(y, x)], dim=1)


def _append_tokens(x, t, y):
    t, y = (one_per_sample(c, x).unsqueeze(1) for c in (t, y))  # (B, 1, D) each
    return torch.cat([x, t, y], dim=1), None


class Conditioning(NamedTuple):
    """How timestep and class enter a DiT."""

    block: Callable[..., Any]  # (hidden_size, num_heads, mlp_ratio) -> a module
    final: Callable[..., Any]  # (hidden_size, patch_size, out_channels) -> a module
    combine: Callable  # (x (B, N, D), t, y (B or 1, D)) -> (tokens, conditioning) for the blocks


CONDITIONINGS = {
    "adaln_zero": Conditioning(DiTBlock, FinalLayer, _sum_embeddings),
    "adaln": Conditioning(AdaLNBlock, FinalLayer, _sum_embeddings),
    "cross_attention": Conditioning(CrossAttentionBlock, PlainFinalLayer, _stack_embeddings),
    "in_context": Conditioning(InContextBlock, PlainFinalLayer, _append_tokens),
}


def check_conditioning(name: str) -> None:
    """Raise a ValueError that suggests the closest name, if there is no conditioning ``name``."""
    if name not in CONDITIONINGS:
        hint = did_you_mean(name, CONDITIONINGS)
        raise ValueError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {name!r}{hint}")
