"""A block on the CPU's kernels in inference; all arguments are checked."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.models.carry import Carry, pending_bias, set_pending
from ditfast.ops import ATTENTION, JUNCTION, LAYER_NORM_MODULATE, MLP, QKV_ATTENTION, extension, gemm, host
from ditfast.ops.attention import choose_attention
from ditfast.ops.autocast import linear_dtype
from ditfast.ops.backends.log import note
from ditfast.ops.bypass import is_intercepted
from ditfast.ops.mlp import choose_mlp
from ditfast.ops.rows import choose_for_rows


def takes_block(carry: Carry, rows: Tensor | None, weights: list[Any], heads: int, scale: float | None) -> bool:
    """Whether the fused operations would all run on kernels, unseen by autograd, modes and profilers."""
    x, y, gate, bias, silu_c, backends = carry
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
        return False
    dtype = linear_dtype(x)
    if is_intercepted((x, y, gate, bias, silu_c, rows, *weights)):
        return False
    if any(t is not None and t.dtype is not dtype for t in (*weights, y)):
        return False
    row, (*_, b_proj, w1, b1, w2, b2) = weights[0] if rows is None else rows, weights  # of the rows' dtype
    chosen = [choose_for_rows(JUNCTION, backends, x, y, b_proj, row, row, row)]
    if y is None:
        chosen.append(choose_for_rows(LAYER_NORM_MODULATE, backends, x, None, None, row, row))
    else:
        chosen.append(choose_for_rows(JUNCTION, backends, x, y, bias, gate, row, row))  # type: ignore[arg-type]
    head_dim = x.shape[2] // heads
    scale = head_dim**-0.5 if scale is None else scale
    chosen.append(choose_attention(QKV_ATTENTION, x, dtype, head_dim, scale, False, backends))
    chosen.append(choose_mlp(x, w1, b1, w2, b2, backends))
    return set(chosen) == {"host"}


def run_block(
    carry: Carry,
    rows: Tensor | None,
    weights: list[Any],
    heads: int,
    scale: float | None,
    eps1: float,
    eps2: float,
) -> Carry:
    """A block; weights and biases are those of modulation, qkv, projection and MLP."""
    w_rows, b_rows, w_qkv, b_qkv, w_proj, b_proj, w1, b1, w2, b2 = weights
    linear, dtype = gemm.linear_on_packed, w_qkv.dtype
    b, n, d = carry.x.shape
    rows = linear(carry.silu_c.to(dtype), w_rows, b_rows) if rows is None else rows
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows.view(b, 6, d).unbind(1)  # (B, D) each
    x, h = _enter(carry, shift_msa, scale_msa, eps1, dtype)
    scale = (d // heads) ** -0.5 if scale is None else float(scale)
    y = linear(_attend(h, w_qkv, b_qkv, heads, scale), w_proj).view(b, n, d)
    x, h, *_ = host.junction(x, y, gate_msa, shift_mlp, scale_mlp, eps2, b_proj, dtype)
    y = linear(gemm.linear_gelu(h.view(b * n, d), w1, b1), w2).view(b, n, d)
    for op in (LAYER_NORM_MODULATE if carry.y is None else JUNCTION, ATTENTION, JUNCTION, MLP):
        note(op.name, "host")
    return set_pending(carry, x, y, gate_mlp, pending_bias(b2))


def _enter(carry, shift, scale, eps, dtype):
    """The tokens, with the pending branch added, and their modulated norm."""
    x, y, gate, bias, *_ = carry
    if y is None:
        return x, host.layer_norm_modulate(x, shift, scale, eps, dtype)[0]
    return host.junction(x, y, gate, shift, scale, eps, bias, dtype)[:2]


def _attend(h, w_qkv, b_qkv, heads, scale):
    """Attention without its projection: (B*N, D). On return qkv is free, in whose memory malloc puts what follows."""
    b, n, d = h.shape
    qkv = gemm.linear_on_packed(h.view(b * n, d), w_qkv, b_qkv).view(b, n, 3 * d)
    return extension.host_forward(qkv, heads, scale)[0].view(b * n, d)
