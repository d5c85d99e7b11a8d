"""The adaLN-Zero block of a DiT and its final layer."""

from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor

from ditfast import ops
from ditfast.models.carry import (
    Carry,
    as_tokens,
    junction,
    modulation,
    pending_bias,
    set_pending,
    split_rows,
    start_carry,
)
from ditfast.models.linears import call_linears
from ditfast.models.plain import (
    has_original_forward,
    is_plain,
    parameter,
    reject_symbolic,
    remember_forward,
)
from ditfast.models.whole import whole_block, whole_final_layer
from ditfast.ops.backends.choice import names_in_force
from ditfast.ops.gemm import linear_with_autograd
from ditfast.ops.sdpa import sdpa


@remember_forward
class Attention(nn.Module):
    """Multi-head self-attention with a packed qkv Linear: (B, N, D) -> (B, N, D).

    Args:
        dim: D.
        num_heads: H; the head dim is d = D / H.
        qkv_bias, proj_bias: whether the qkv and output Linears have a bias.
        qk_norm: whether to normalize q and k over d.
        attn_drop, proj_drop: dropout probability of attention weights and outputs, in training only.
        norm_layer: class of the q and k norms.

    Attributes:
        fused_attn: set to False to pass the attention weights (B, H, N, N) through the module ``attn_drop``, where a
            hook can see them; this runs on plain PyTorch.

    Raises:
        ValueError: H does not divide D.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.
    """

    fused_attn = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide hidden_size={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, backends: tuple[str, ...] | None = None) -> Tensor:
        return self.proj_drop(call_linears(self.proj, self._attend(x, backends)))

    def forward_without_bias(self, x: Tensor, backends: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Return (output without the bias of ``proj``, that bias, or None if already added)."""
        parts: dict[str, Any] = self._modules
        drop, proj = parts["proj_drop"], parts["proj"]
        drops = not is_plain(drop, nn.Dropout) or (drop.training and drop.p > 0)
        if drops or not is_plain(proj, nn.Linear):
            return self.forward(x, backends), None
        out = linear_with_autograd(self._attend(x, backends), parameter(proj, "weight"), None, backends)
        return out, parameter(proj, "bias")

    def _attend(self, x, backends):
        parts = self._modules  # several times faster than attribute access
        qkv, q_norm, k_norm, drop = parts["qkv"], parts["q_norm"], parts["k_norm"], parts["attn_drop"]
        fused = self.fused_attn and has_original_forward(drop, nn.Dropout)
        dropout = drop.p if fused and self.training else 0.0
        # the fused operations support neither q and k norms nor dropout
        if fused and dropout == 0 and is_plain(q_norm, nn.Identity) and is_plain(k_norm, nn.Identity):
            if is_plain(qkv, nn.Linear):
                weight, bias = parameter(qkv, "weight"), parameter(qkv, "bias")
                return ops.qkv_attention(x, weight, bias, self.num_heads, self.scale, backend=backends)
            return ops.attention(qkv(x), self.num_heads, self.scale, backend=backends)
        qkv = call_linears(qkv, x)  # (B, N, 3*D)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)
        q, k, v = qkv.unbind(0)
        q, k = q_norm(q), k_norm(k)
        if fused:
            out = sdpa(q, k, v, self.scale, dropout)  # (B, H, N, d)
        else:
            weights = (q * self.scale @ k.mT).softmax(-1)  # (B, H, N, N)
            out = drop(weights) @ v
        return out.transpose(1, 2).flatten(2)  # (B, N, D)


@remember_forward
class Mlp(nn.Module):
    """Linear, tanh GELU, Linear: (B, N, D) -> (B, N, D).

    Args:
        in_features: D.
        hidden_features: width between the two Linears.

    Attributes:
        recompute: save only the tensor before GELU and recompute the activation in backward (default False).

    Source: Peebles & Xie, section 3.2, "pointwise feedforward".
    """

    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.recompute = False

    def forward(self, x: Tensor, backends: tuple[str, ...] | None = None) -> Tensor:
        weights = self._weights()
        if weights is None:
            return call_linears(self.fc2, self.act(call_linears(self.fc1, x)))
        w1, b1, w2, b2 = weights
        return ops.mlp(x, w1, b1, w2, b2, self.recompute, backend=backends)

    def forward_without_bias(self, x: Tensor, backends: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        """Return (output without the bias of ``fc2``, that bias, or None if already added)."""
        weights = self._weights()
        if weights is None:
            return self.forward(x, backends), None
        w1, b1, w2, b2 = weights
        return ops.mlp(x, w1, b1, w2, recompute=self.recompute, backend=backends), b2

    def _weights(self):
        """The weights to pass to the fused operation; None if it cannot replace the submodules."""
        parts = self._modules
        fc1, act, fc2 = parts["fc1"], parts["act"], parts["fc2"]
        if not (is_plain(fc1, nn.Linear) and is_plain(fc2, nn.Linear) and is_plain(act, nn.GELU)):
            return None
        bias = parameter(fc1, "bias")
        if bias is None or act.approximate != "tanh":
            return None
        return parameter(fc1, "weight"), bias, parameter(fc2, "weight"), parameter(fc2, "bias")


def call_branch(module: nn.Module, h: Tensor, backends: tuple[str, ...]) -> Tensor:
    """Call ``module``: an `Attention`, an `Mlp`, or a replacement of one."""
    native = has_original_forward(module, Attention) or has_original_forward(module, Mlp)
    return module(h, backends=backends) if native else module(h)


def call_without_bias(module: nn.Module, h: Tensor, backends: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
    """Like `call_branch`; return (output without the final bias, that bias, or None if already added)."""
    if is_plain(module, Attention) or is_plain(module, Mlp):
        return module.forward_without_bias(h, backends)  # type: ignore[operator]  # one of the two
    return call_branch(module, h, backends), None


_PARTS = {  # of a `DiTBlock`
    "norm1": nn.LayerNorm,
    "attn": Attention,
    "norm2": nn.LayerNorm,
    "mlp": Mlp,
    "adaLN_modulation": nn.Sequential,
}
_FINAL_PARTS = {"norm_final": nn.LayerNorm, "linear": nn.Linear, "adaLN_modulation": nn.Sequential}


@remember_forward
class DiTBlock(nn.Module):
    """A transformer block with adaptive LayerNorm and gates that start at zero (adaLN-Zero).

    ``block(x, c)`` maps tokens (B, N, D) and conditioning (B, D) to tokens (B, N, D). Given a `Carry`, ``block(carry,
    c)`` returns a `Carry`: the same tokens, with the last branch still to be added. The backends are those of the
    carry, else ``backends``, else those in force.

    Args:
        hidden_size: D.
        num_heads: attention heads; must divide D.
        mlp_ratio: width of the MLP over D.
        block_kwargs: ``qk_norm``, ``proj_bias``, ``attn_drop``, ``proj_drop``, ``norm_layer`` of `Attention`.

    Raises:
        TypeError: any other keyword.
        ValueError: num_heads does not divide D.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block".
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, **block_kwargs: Any):
        super().__init__()
        unknown = block_kwargs.keys() - {"qk_norm", "proj_bias", "attn_drop", "proj_drop", "norm_layer"}
        if unknown:
            raise TypeError(
                f"DiTBlock got an unknown argument {min(unknown)!r}; it takes hidden_size, num_heads, mlp_ratio, "
                "qk_norm, proj_bias, attn_drop, proj_drop and norm_layer"
            )
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, **block_kwargs)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    takes_carry = True

    @property
    def is_native(self) -> bool:
        """Whether the block runs the package's own forward."""
        return has_original_forward(self, DiTBlock)

    def forward(self, x: Tensor | Carry, c: Tensor, backends: tuple[str, ...] | None = None) -> Tensor | Carry:
        if isinstance(x, Carry):
            done = whole_block(self._modules, _PARTS, x)
            return self._fused(x, c) if done is None else done
        reject_symbolic(x)
        carry = start_carry(x, c, backends or names_in_force())
        done = whole_block(self._modules, _PARTS, carry)
        return as_tokens(self._fused(carry, c) if done is None else done)

    def forward_rows(self, carry: Carry, rows: Tensor) -> Carry:
        """Run the block on a `Carry` with precomputed modulation: rows (B or 1, 6*D)."""
        done = whole_block(self._modules, _PARTS, carry, rows)
        return self._fused(carry, None, rows) if done is None else done

    def _fused(self, carry, c, rows=None):
        parts = self._modules
        rows = modulation(parts["adaLN_modulation"], c, carry) if rows is None else rows
        rows = split_rows(rows, 6, carry.x)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows  # (B, D) each
        x, h = junction(carry, parts["norm1"], shift_msa, scale_msa)  # (B, N, D) each
        y, bias = call_without_bias(parts["attn"], h, carry.backends)
        x, h = junction(set_pending(carry, x, y, gate_msa, bias), parts["norm2"], shift_mlp, scale_mlp)
        y, bias = call_without_bias(parts["mlp"], h, carry.backends)
        return set_pending(carry, x, y, gate_mlp, pending_bias(bias))


@remember_forward
class FinalLayer(nn.Module):
    """adaLN and a Linear from tokens, or a `Carry`, to patches: (B, N, D), (B, D) -> (B, N, p*p*C).

    Args:
        hidden_size: D.
        patch_size: p, in pixels of the latent.
        out_channels: C.

    Source: Peebles & Xie, section 3.2, "Transformer decoder".
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    takes_carry = True

    @property
    def is_native(self) -> bool:
        """Whether the layer runs the package's own forward."""
        return has_original_forward(self, FinalLayer)

    def forward(self, x: Tensor | Carry, c: Tensor, backends: tuple[str, ...] | None = None) -> Tensor:
        reject_symbolic(x)
        carry = x if isinstance(x, Carry) else start_carry(x, c, backends or names_in_force())
        done = whole_final_layer(self._modules, _FINAL_PARTS, carry)
        return self._fused(carry, modulation(self.adaLN_modulation, c, carry)) if done is None else done

    def forward_rows(self, carry: Carry, rows: Tensor) -> Tensor:
        """Run the layer on a `Carry` with precomputed modulation: rows (B or 1, 2*D)."""
        done = whole_final_layer(self._modules, _FINAL_PARTS, carry, rows)
        return self._fused(carry, rows) if done is None else done

    def _fused(self, carry, rows):
        shift, scale = split_rows(rows, 2, carry.x)  # (B, D) each
        _, h = junction(carry, self.norm_final, shift, scale)  # (B, N, D)
        return call_linears(self.linear, h)  # (B, N, p*p*C)
