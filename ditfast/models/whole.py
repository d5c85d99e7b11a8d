"""A whole block, final layer or patch embedding after one check of everything, on the CPU in eager mode.

The fused operations each check their arguments and choose a backend. That takes longer than small layers compute, and
in inference a twentieth of a DiT-S/2's time. So this asks once for a whole layer, and then runs PyTorch's operations
(`unfused`) or the kernels (`on_host`). Anything unusual gives None, and is left to the fused operations: their checks
explain it, and their backend choice respects it.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ditfast.models import on_host, unfused
from ditfast.models.carry import Carry, modulates_as_usual
from ditfast.models.plain import ORDINARY, are_plain
from ditfast.ops import ATTENTION, JUNCTION, MLP, PATCH_EMBED, checks, reference
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.choice import is_automatic, repeated_backends
from ditfast.ops.backends.log import note
from ditfast.ops.op import PYTORCH

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
_STRIDED = torch.strided  # its attribute takes as long as the comparison


def _may_be_whole(x, backends) -> bool:
    """Whether the rest is worth checking, by checks that cost next to nothing."""
    if type(x) is not Tensor or not x.is_cpu or x.layout is not _STRIDED or not is_automatic(backends):
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    return not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled())


def whole_embedding(
    x: Tensor, weight: Tensor, bias: Any, pos_embed: Any, patch_size: int, *, backend: tuple[str, ...]
) -> Tensor | None:
    """`ditfast.ops.patch_embed` with pos_embed (1, N, D)."""
    p = patch_size
    if not _may_be_whole(x, backend) or x.dim() != 4 or x.shape[2] % p or x.shape[3] % p:
        return None
    (b, c, height, width), d = x.shape, len(weight)
    n = (height // p) * (width // p)
    parameters = weight, bias, pos_embed
    if not _fit(parameters, ((d, c, p, p), (d,), (1, n, d))) or not _have_dtype(x.dtype, parameters):
        return None
    if not _are_small(x, {PATCH_EMBED.name: b * n * d}):
        return None
    tokens = reference.patch_embed(x, *parameters, p)
    note(PATCH_EMBED.name, "reference")
    return tokens


def whole_block(
    parts: dict[str, Any], kinds: dict[str, type[nn.Module]], carry: Carry, rows: Tensor | None = None
) -> Carry | None:
    """Run a block on ``carry``.

    Args:
        parts: the submodules of a `DiTBlock`.
        kinds: what they must be.
        rows: (B, 6*D) modulation, if it is already computed.
    """
    if not (_may_be_whole(carry.x, carry.backends) and are_plain(parts, kinds)):
        return None
    attn, mlp, norms = parts["attn"], parts["mlp"], (parts["norm1"], parts["norm2"])
    weights = _weights(_linears(attn._modules, mlp._modules, parts["adaLN_modulation"]._modules))
    if not (weights and _are_usual(attn, mlp, norms) and _block_fits(weights, carry, rows)):
        return None
    (b, n, d), heads, width = carry.x.shape, attn.num_heads, weights[6].shape[0]
    if d % heads:
        return None
    for norm in norms:
        checks.epsilon(norm.eps)
    checks.factor("scale", attn.scale)
    arguments = carry, rows, weights, heads, attn.scale, norms[0].eps, norms[1].eps
    sizes = {JUNCTION.name: b * n * d, ATTENTION.name: b * n * d // heads, MLP.name: b * n * width}
    if not _are_small(carry.x, sizes):
        return on_host.run_block(*arguments) if on_host.takes_block(carry, rows, weights, heads, attn.scale) else None
    if not _have_dtype(carry.x.dtype, (*weights, *_inputs(carry, rows))):
        return None
    done = unfused.run_block(*arguments)
    unfused.note_block(carry)
    return done


def whole_final_layer(
    parts: dict[str, Any], kinds: dict[str, type[nn.Module]], carry: Carry, rows: Tensor | None = None
) -> Tensor | None:
    """Run a final layer on ``carry``, as `whole_block` does a block: (B, N, p*p*C); rows are (B, 2*D)."""
    if not (_may_be_whole(carry.x, carry.backends) and are_plain(parts, kinds)):
        return None
    adaln, norm, x = parts["adaLN_modulation"]._modules, parts["norm_final"], carry.x
    weights = _weights((adaln["1"], parts["linear"]) if are_plain(adaln, _ADALN) else ())
    if not (weights and modulates_as_usual() and _is_bare(norm) and _final_fits(weights, carry, rows)):
        return None
    if not _are_small(x, {JUNCTION.name: x.numel()}) or not _have_dtype(x.dtype, (*weights, *_inputs(carry, rows))):
        return None
    checks.epsilon(norm.eps)
    out = unfused.run_final(carry, rows, weights, norm.eps)
    unfused.note_norm(carry)
    return out


def _are_small(x, sizes) -> bool:
    """Whether PyTorch would run all of these operations, {name: elements}, in the dtype of x."""
    if torch.is_autocast_enabled("cpu"):
        return False
    earlier = repeated_backends(sizes)
    return earlier.issubset(PYTORCH) if earlier else on_cpu.is_below(x.dtype, sizes)


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
    """Whether these modules have the settings that both ways to run a block implement."""
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


def _inputs(carry, rows):
    """What a layer reads besides x and its weights."""
    return carry.y, carry.gate, carry.bias, carry.silu_c if rows is None else rows


def _have_dtype(dtype, tensors) -> bool:
    """Whether all have this dtype; PyTorch would promote some others, and fail on the rest."""
    for t in tensors:
        if t is not None and t.dtype is not dtype:
            return False
    return True


def _fit(tensors, shapes) -> bool:
    """Whether all are dense CPU tensors of these shapes; PyTorch would silently accept some others."""
    for t, shape in zip(tensors, shapes, strict=True):
        if t is None and len(shape) == 1:  # a bias
            continue
        if type(t) not in ORDINARY or t.shape != shape or not t.is_cpu or t.layout is not _STRIDED:
            return False
    return True
