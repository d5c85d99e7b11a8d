"""A block and a final layer in PyTorch's own operations, for small tensors; all arguments are checked."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.models.carry import Carry, set_pending
from ditfast.ops import ATTENTION, JUNCTION, LAYER_NORM_MODULATE, MLP, tangents
from ditfast.ops.backends.log import current_log, note
from ditfast.ops.sdpa import sdpa


def run_block(
    carry: Carry,
    rows: Tensor | None,
    weights: list[Tensor],
    heads: int,
    scale: float | None,
    eps1: float,
    eps2: float,
) -> Carry:
    """A block; weights and biases are those of modulation, qkv, projection and MLP."""
    w_rows, b_rows, w_qkv, b_qkv, w_proj, b_proj, w1, b1, w2, b2 = weights
    linear = _linear()
    b, n, d = carry.x.shape
    rows = linear(carry.silu_c, w_rows, b_rows) if rows is None else rows
    rows = rows.view(b, 6, 1, d)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows.unbind(1)  # (B, 1, D) each
    x = _add_pending(carry)
    h = _norm_modulate(x, shift_msa, scale_msa, eps1)
    qkv = linear(h, w_qkv, b_qkv).view(b, n, 3, heads, d // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    out = sdpa(q, k, v, scale).transpose(1, 2).reshape(b, n, d)
    x = torch.addcmul(x, gate_msa, linear(out, w_proj, b_proj))
    h = _norm_modulate(x, shift_mlp, scale_mlp, eps2)
    y = linear(F.gelu(linear(h, w1, b1), approximate="tanh"), w2, b2)
    return set_pending(carry, x, y, gate_mlp.squeeze(1), None)


def run_final(carry: Carry, rows: Tensor | None, weights: list[Tensor], eps: float) -> Tensor:
    """A final layer; weights and biases are those of modulation and output."""
    w_rows, b_rows, weight, bias = weights
    linear = _linear()
    b, _, d = carry.x.shape
    rows = linear(carry.silu_c, w_rows, b_rows) if rows is None else rows
    shift, scale = rows.view(b, 2, 1, d).unbind(1)  # (B, 1, D) each
    return linear(_norm_modulate(_add_pending(carry), shift, scale, eps), weight, bias)


def _linear():
    return tangents.linear if forward_ad._current_level >= 0 else F.linear


def _add_pending(carry):
    x, y, gate, bias, *_ = carry
    return x if y is None else torch.addcmul(x, gate.unsqueeze(1), y if bias is None else y + bias)


def _norm_modulate(x, shift, scale, eps):
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[2],), eps=eps), 1 + scale)


def note_block(carry: Carry) -> None:
    """Log the equivalent operations for `record`."""
    note_norm(carry)
    if current_log() is not None:
        note(ATTENTION.name, "sdpa")
        note(JUNCTION.name, "reference")
        note(MLP.name, "reference")


def note_norm(carry: Carry) -> None:
    """Log what the first operation of a layer would have been."""
    note(LAYER_NORM_MODULATE.name if carry.y is None else JUNCTION.name, "reference")
