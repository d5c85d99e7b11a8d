"""Stateless layers for ``kernels.kernelize``, each with the forward of a module of the original DiT.

``self`` is the kernelized module: it must have the named parts, and neither dropout nor norms of q and k.
"""

from torch import nn

from ditfast import ops


class LayerNormModulate(nn.Module):
    """For a module with ``eps``: x (B, N, D), shift, scale (B, D) -> (B, N, D)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x, shift, scale):
        return ops.layer_norm_modulate(x, shift, scale, self.eps)


class GatedResidual(nn.Module):
    """x, y (B, N, D), gate (B, D) -> (B, N, D)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x, y, gate):
        return ops.gated_residual(x, y, gate)


class Mlp(nn.Module):
    """timm's, with Linears ``fc1`` and ``fc2`` with biases and GELU (tanh) between them: (B, N, D) -> (B, N, D)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x):
        return ops.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class Attention(nn.Module):
    """timm's, with ``num_heads`` and Linears ``qkv`` and ``proj``: (B, N, D) -> (B, N, D)."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x):
        return self.proj(ops.qkv_attention(x, self.qkv.weight, self.qkv.bias, self.num_heads))
