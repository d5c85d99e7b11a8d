"""A model's layers in PyTorch's own operations, for the CPU when no kernel would be chosen.

There the fused operations, which each check their arguments and choose a backend, cost more than they compute. So
each function here checks once for a whole layer, and returns None for anything unusual. That is left to the fused
operations: their checks explain it, and their backend choice respects it.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.models.carry import Carry, modulates_as_usual, set_pending
from ditfast.models.plain import ORDINARY, are_plain
from ditfast.ops import (
    ATTENTION,
    GATED_RESIDUAL,
    JUNCTION,
    LAYER_NORM_MODULATE,
    MLP,
    PATCH_EMBED,
    checks,
    reference,
    tangents,
)
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


def may_be_unfused(x: Tensor, backends: tuple[str, ...]) -> bool:
    """Whether the functions below are worth trying, by checks that cost next to nothing."""
    if type(x) is not Tensor or not x.is_cpu or not is_automatic(backends):
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not torch.is_autocast_enabled("cpu")


def embed_unfused(x: Tensor, weight: Tensor, bias: Any, pos_embed: Any, patch_size: int) -> Tensor | None:
    """`ditfast.ops.patch_embed` with pos_embed (1, N, D)."""
    p = patch_size
    if x.dim() != 4 or x.shape[2] % p or x.shape[3] % p:
        return None
    (b, c, height, width), d = x.shape, len(weight)
    n = (height // p) * (width // p)
    if not _fit((weight, bias, pos_embed), ((d, c, p, p), (d,), (1, n, d))):
        return None
    if not _are_small(x.dtype, {PATCH_EMBED.name: b * n * d}):
        return None
    try:
        tokens = reference.patch_embed(x, weight, bias, pos_embed, p)
    except (RuntimeError, TypeError):  # incompatible dtypes
        return None
    if tokens.dtype is not x.dtype:  # something was promoted
        return None
    note(PATCH_EMBED.name, "reference")
    return tokens


def block_unfused(parts: dict[str, Any], carry: Carry, rows: Tensor | None = None) -> Carry | None:
    """Run a block on ``carry``.

    Args:
        parts: the submodules of a `DiTBlock`, all of them plain.
        rows: (B, 6*D) modulation, if it is already computed.
    """
    attn, mlp = parts["attn"], parts["mlp"]
    weights = _weights(_linears(attn._modules, mlp._modules, parts["adaLN_modulation"]._modules))
    norms, heads, x = (parts["norm1"], parts["norm2"]), attn.num_heads, carry.x
    if not (weights and _are_usual(attn, mlp, norms) and _block_fits(weights, carry, rows)):
        return None
    (b, n, d), width = x.shape, weights[6].shape[0]
    sizes = {JUNCTION.name: b * n * d, ATTENTION.name: b * n * d // heads, MLP.name: b * n * width}
    if d % heads or not _are_small(x.dtype, sizes):
        return None
    for norm in norms:
        checks.epsilon(norm.eps)
    checks.factor("scale", attn.scale)
    try:
        done = _run_block(carry, rows, weights, heads, attn.scale, norms[0].eps, norms[1].eps)
    except (RuntimeError, TypeError):  # incompatible dtypes
        return None
    for t in (done.x, done.y, done.gate):  # otherwise something was promoted
        if t.dtype is not x.dtype:
            return None
    _note_block(carry)
    return done


def final_unfused(parts: dict[str, Any], carry: Carry, rows: Tensor | None = None) -> Tensor | None:
    """Run a final layer on ``carry``: (B, N, p*p*C).

    Args:
        parts: the submodules of a `FinalLayer`, all of them plain.
        rows: (B, 2*D) modulation, if it is already computed.
    """
    adaln, norm, x = parts["adaLN_modulation"]._modules, parts["norm_final"], carry.x
    weights = _weights((adaln["1"], parts["linear"]) if are_plain(adaln, _ADALN) else ())
    if not (weights and modulates_as_usual() and _is_bare(norm) and _final_fits(weights, carry, rows)):
        return None
    if not _are_small(x.dtype, {JUNCTION.name: x.numel()}):
        return None
    checks.epsilon(norm.eps)
    try:
        out = _run_final(carry, rows, weights, norm.eps)
    except (RuntimeError, TypeError):  # incompatible dtypes
        return None
    if out.dtype is not x.dtype:  # something was promoted
        return None
    _note_norm(carry)
    return out


def add_unfused(carry: Carry) -> Tensor:
    """The tokens of `block_unfused`'s result."""
    note(GATED_RESIDUAL.name, "reference")
    return _add_pending(carry)


def _are_small(dtype, sizes) -> bool:
    """Whether PyTorch would run all of these operations, {name: elements}."""
    earlier = repeated_backends(sizes)
    return earlier.issubset(PYTORCH) if earlier else on_cpu.is_below(dtype, sizes)


def _linears(attn, mlp, adaln):
    """The Linears of modulation, qkv, projection and MLP; empty if a module is not plain."""
    if not (are_plain(attn, _ATTENTION) and are_plain(mlp, _MLP) and are_plain(adaln, _ADALN)):
        return ()
    return adaln["1"], attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]


def _weights(linears) -> list[Any]:
    """Weight and bias of each, in turn."""
    weights: list[Any] = []
    for linear in linears:
        own = linear._parameters
        weights += (own.get("weight", linear), own.get("bias", linear))  # a module never fits
    return weights


def _are_usual(attn, mlp, norms) -> bool:
    """Whether these modules have the settings that `_run_block` implements."""
    if not modulates_as_usual() or not attn.fused_attn or mlp.recompute or mlp._modules["act"].approximate != "tanh":
        return False
    for norm in norms:
        if not _is_bare(norm):
            return False
    for name in ("attn_drop", "proj_drop"):
        drop = attn._modules[name]
        if drop.p > 0 and (attn.training or drop.training):
            return False
    return True


def _is_bare(norm) -> bool:
    """Whether a plain LayerNorm is one over the last dimension without parameters."""
    own = norm._parameters
    has_weights = own.get("weight", norm) is not None or own.get("bias", norm) is not None
    return not has_weights and len(norm.normalized_shape) == 1


def _block_fits(weights, carry, rows) -> bool:
    w1 = weights[6]
    if type(w1) not in ORDINARY or not _carry_fits(carry, rows, 6):
        return False
    d, width = carry.x.shape[2], w1.shape[0]
    shapes = (6 * d, d), (6 * d,), (3 * d, d), (3 * d,), (d, d), (d,), (width, d), (width,), (d, width), (d,)
    return _fit(weights, shapes)


def _final_fits(weights, carry, rows) -> bool:
    linear = weights[2]
    if type(linear) not in ORDINARY or not _carry_fits(carry, rows, 2):
        return False
    d, width = carry.x.shape[2], linear.shape[0]
    return _fit(weights, ((2 * d, d), (2 * d,), (width, d), (width,)))


def _carry_fits(carry, rows, parts) -> bool:
    x, y, gate, bias, silu_c, _ = carry
    shape = x.shape
    if len(shape) != 3 or x.numel() == 0:
        return False
    b, _, d = shape
    if not _fit((silu_c,), ((b, d),)) if rows is None else not _fit((rows,), ((b, parts * d),)):
        return False
    return y is None or _fit((y, gate, bias), (shape, (b, d), (d,)))


def _fit(tensors, shapes) -> bool:
    """Whether all are plain CPU tensors of these shapes; PyTorch would silently accept some others."""
    for t, shape in zip(tensors, shapes, strict=True):
        if t is None and len(shape) == 1:  # a bias
            continue
        if type(t) not in ORDINARY or t.shape != shape or not t.is_cpu:
            return False
    return True


def _run_block(carry, rows, weights, heads, scale, eps1, eps2):
    w_rows, b_rows, w_qkv, b_qkv, w_proj, b_proj, w1, b1, w2, b2 = weights
    linear = _linear()
    b, n, d = carry.x.shape
    rows = linear(carry.silu_c, w_rows, b_rows) if rows is None else rows
    rows = rows.view(b, 6, 1, d)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = rows.unbind(1)  # (B, 1, D) each
    x = _add_pending(carry)
    h = _norm_modulate(x, shift_msa, scale_msa, eps1)
    qkv = linear(h, w_qkv, b_qkv).view(b, n, 3, heads, d // heads)
    out = sdpa(*qkv.permute(2, 0, 3, 1, 4).unbind(0), scale)  # of q, k, v (B, H, N, d)
    out = out.transpose(1, 2).reshape(b, n, d)
    x = torch.addcmul(x, gate_msa, linear(out, w_proj, b_proj))
    h = _norm_modulate(x, shift_mlp, scale_mlp, eps2)
    y = linear(F.gelu(linear(h, w1, b1), approximate="tanh"), w2, b2)
    return set_pending(carry, x, y, gate_mlp.squeeze(1), None)


def _run_final(carry, rows, weights, eps):
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


def _note_block(carry):
    """Log the equivalent operations for `record`."""
    _note_norm(carry)
    if current_log() is not None:
        note(ATTENTION.name, "sdpa")
        note(JUNCTION.name, "reference")
        note(MLP.name, "reference")


def _note_norm(carry):
    note(LAYER_NORM_MODULATE.name if carry.y is None else JUNCTION.name, "reference")
