"""An adaLN-Zero block in PyTorch's own operations, for the CPU when no kernel would be chosen.

There the fused operations, which each check their arguments and choose a backend, cost more than they compute. So
this checks once for the whole block. Anything unusual is left to them: their checks explain it, and their backend
choice respects it.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.models.carry import Carry, modulates_as_usual, set_pending
from ditfast.models.plain import ORDINARY, are_plain
from ditfast.ops import ATTENTION, GATED_RESIDUAL, JUNCTION, LAYER_NORM_MODULATE, MLP, checks, tangents
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.choice import is_automatic, repeated_backends
from ditfast.ops.backends.log import current_log, note
from ditfast.ops.op import PYTORCH
from ditfast.ops.sdpa import sdpa

_ATTENTION = {
    "qkv": nn.Linear,
    "q_norm": nn.Identity,
    "k_norm": nn.Identity,
    "attn_drop": nn.Dropout,
    "proj": nn.Linear,
    "proj_drop": nn.Dropout,
}
_MLP = {"fc1": nn.Linear, "act": nn.GELU, "fc2": nn.Linear}
_ADALN = {"0": nn.SiLU, "1": nn.Linear}


def may_be_unfused(carry: Carry) -> bool:
    """Whether `forward_unfused` is worth trying, by checks that cost next to nothing."""
    x = carry.x
    if type(x) is not Tensor or not x.is_cpu or not is_automatic(carry.backends):
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not torch.is_autocast_enabled("cpu")


def forward_unfused(parts: dict[str, Any], carry: Carry, rows: Tensor | None = None) -> Carry | None:
    """Run a block on ``carry``; None if the fused operations must do it.

    Args:
        parts: the submodules of a `DiTBlock`, all of them plain.
        rows: (B, 6*D) modulation, if it is already computed.
    """
    attn, mlp = parts["attn"], parts["mlp"]
    weights: list[Any] = []
    for linear in _linears(attn._modules, mlp._modules, parts["adaLN_modulation"]._modules):
        own = linear._parameters
        weights += (own.get("weight", linear), own.get("bias", linear))  # a module never fits
    norms, heads, x = (parts["norm1"], parts["norm2"]), attn.num_heads, carry.x
    fits = weights and _are_usual(attn, mlp, norms) and _fit(weights, carry, rows)
    if not (fits and x.shape[2] % heads == 0):
        return None
    (b, n, d), width = x.shape, weights[6].shape[0]
    sizes = {JUNCTION.name: b * n * d, ATTENTION.name: b * n * d // heads, MLP.name: b * n * width}
    earlier = repeated_backends(sizes)
    if not (earlier.issubset(PYTORCH) if earlier else on_cpu.is_below(x.dtype, sizes)):
        return None
    for norm in norms:
        checks.epsilon(norm.eps)
    checks.factor("scale", attn.scale)
    try:
        done = _forward(carry, rows, weights, heads, attn.scale, norms[0].eps, norms[1].eps)
    except (RuntimeError, TypeError):  # incompatible dtypes
        return None
    for t in (done.x, done.y, done.gate):  # otherwise something was promoted
        if t.dtype is not x.dtype:
            return None
    _note(carry)
    return done


def add_unfused(carry: Carry) -> Tensor:
    """The tokens of `forward_unfused`'s result."""
    note(GATED_RESIDUAL.name, "reference")
    x, y, gate, *_ = carry
    return torch.addcmul(x, gate.unsqueeze(1), y)  # type: ignore[union-attr,arg-type]  # both are set


def _linears(attn, mlp, adaln):
    """The Linears of modulation, qkv, projection and MLP; empty if a module is not plain."""
    if not (are_plain(attn, _ATTENTION) and are_plain(mlp, _MLP) and are_plain(adaln, _ADALN)):
        return ()
    return adaln["1"], attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]


def _are_usual(attn, mlp, norms) -> bool:
    """Whether these modules have the settings that `_forward` implements."""
    if not modulates_as_usual() or not attn.fused_attn or mlp.recompute or mlp._modules["act"].approximate != "tanh":
        return False
    for norm in norms:
        own = norm._parameters
        has_weights = own.get("weight", norm) is not None or own.get("bias", norm) is not None
        if has_weights or len(norm.normalized_shape) != 1:
            return False
    for name in ("attn_drop", "proj_drop"):
        drop = attn._modules[name]
        if drop.p > 0 and (attn.training or drop.training):
            return False
    return True


def _fit(weights, carry, rows):
    """Whether all are plain CPU tensors with a block's shapes; PyTorch would silently accept some others."""
    x, y, gate, bias, silu_c, _ = carry
    shape, w1 = x.shape, weights[6]
    if len(shape) != 3 or x.numel() == 0 or type(w1) not in ORDINARY:
        return False
    row, d, width = (shape[0], shape[2]), shape[2], w1.shape[0]
    given = row if rows is None else (shape[0], 6 * d)
    shapes = ((6 * d, d), (6 * d,), (3 * d, d), (3 * d,), (d, d), (d,), (width, d), (width,), (d, width), (d,), given)
    tensors = (*weights, silu_c if rows is None else rows)
    if y is not None:
        shapes, tensors = (*shapes, shape, row, (d,)), (*tensors, y, gate, bias)
    for t, expected in zip(tensors, shapes, strict=True):
        if t is None and len(expected) == 1:  # a bias
            continue
        if type(t) not in ORDINARY or t.shape != expected or not t.is_cpu:
            return False
    return True


def _forward(carry, rows, weights, heads, scale, eps1, eps2):
    w_rows, b_rows, w_qkv, b_qkv, w_proj, b_proj, w1, b1, w2, b2 = weights
    linear = tangents.linear if forward_ad._current_level >= 0 else F.linear
    b, n, d = carry.x.shape
    rows = linear(carry.silu_c, w_rows, b_rows) if rows is None else rows
    rows = rows.unflatten(1, (6, 1, d))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows.unbind(1)  # (B, 1, D) each
    x, y, gate, bias, *_ = carry
    if y is not None:
        x = torch.addcmul(x, gate.unsqueeze(1), y if bias is None else y + bias)
    h = _norm_modulate(x, shift_msa, scale_msa, eps1)
    qkv = linear(h, w_qkv, b_qkv).view(b, n, 3, heads, d // heads)
    out = sdpa(*qkv.permute(2, 0, 3, 1, 4).unbind(0), scale)  # of q, k, v (B, H, N, d)
    out = out.transpose(1, 2).reshape(b, n, d)
    x = torch.addcmul(x, gate_msa, linear(out, w_proj, b_proj))
    h = _norm_modulate(x, shift_mlp, scale_mlp, eps2)
    y = linear(F.gelu(linear(h, w1, b1), approximate="tanh"), w2, b2)
    return set_pending(carry, x, y, gate_mlp.squeeze(1), None)


def _norm_modulate(x, shift, scale, eps):
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[2],), eps=eps), 1 + scale)


def _note(carry):
    """Log the equivalent operations for `record`."""
    if current_log() is not None:
        note(LAYER_NORM_MODULATE.name if carry.y is None else JUNCTION.name, "reference")
        note(ATTENTION.name, "sdpa")
        note(JUNCTION.name, "reference")
        note(MLP.name, "reference")
