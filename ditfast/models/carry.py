"""The residual stream between blocks, with the last branch still to be added.

A block ends with ``x + gate * branch`` and the next begins with a LayerNorm of that sum. Both are done in one
pass, the junction, if the block hands on the branch instead of the sum.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ditfast import ops
from ditfast.models.plain import is_bare_layer_norm, is_plain, parameter
from ditfast.ops.gemm import linear_for_inference


class Carry(NamedTuple):
    """What blocks exchange in place of tokens, which are ``x + gate * (y + bias)``, or x where y is None."""

    x: torch.Tensor  # (B, N, D)
    y: torch.Tensor | None  # (B, N, D) branch that is not yet added
    gate: torch.Tensor | None  # (B, D)
    bias: torch.Tensor | None  # (D,) of the Linear that made y
    silu_c: torch.Tensor  # (B, D) SiLU of the conditioning, the same for all blocks
    backends: tuple[str, ...]  # in force when the forward began; a recompute in backward takes the same


def start_carry(x, c, backends) -> Carry:
    return Carry(x, None, None, None, F.silu(c), backends)


def set_pending(carry: Carry, x, y, gate, bias) -> Carry:
    """Leave ``gate * (y + bias)`` for the next junction to add to x."""
    return Carry(x, y, gate, bias, carry.silu_c, carry.backends)


def add_pending(state):
    """Add the pending branch of a `Carry`; tokens stay as they are."""
    if not isinstance(state, Carry) or state.y is None:
        return state
    carry = state
    x = ops.gated_residual(carry.x, carry.y, carry.gate, carry.bias, backend=carry.backends)
    return set_pending(carry, x, None, None, None)


def as_tokens(state):
    """The tokens (B, N, D) of a `Carry`, or those given."""
    state = add_pending(state)
    return state.x if isinstance(state, Carry) else state


def modulation(adaln: nn.Module, c, carry: Carry):
    """The shifts, scales and gates that ``adaln`` makes of the conditioning c, side by side: (B, parts * D)."""
    if is_plain(adaln, nn.Sequential):
        layers = tuple(adaln._modules.values())
        if len(layers) == 2 and is_plain(layers[0], nn.SiLU):
            return _call_linear(layers[1], carry.silu_c, carry.backends)
    return adaln(c)


def _call_linear(layer: nn.Module, x, backends):
    if not is_plain(layer, nn.Linear):
        return layer(x)
    return linear_for_inference(x, parameter(layer, "weight"), parameter(layer, "bias"), backends)


def split_rows(rows, parts: int, x):
    """Rows (B or 1, parts * D) as that many (B, D), for the samples of x."""
    # not by chunk, of which some quantized tensors make parts with the shape of the whole
    return one_per_sample(rows, x).unflatten(1, (parts, -1)).unbind(1)


def one_per_sample(rows, x):
    """Rows (B, ...) for the samples of x, views of one where a single one (1, ...) stands for all."""
    batch = x.shape[0]
    return rows.expand(batch, *rows.shape[1:]) if rows.shape[0] == 1 != batch else rows


def modulate(x, shift, scale):
    """``x * (1 + scale) + shift`` with one row per sample: x (B, N, D); shift, scale (B, D).

    Source: Peebles & Xie, section 3.2, "adaLN block".
    """
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


_modulate = modulate  # what the fused operations compute


def _modulate_in_force():
    """`modulate`, or what others have put in its place, here or in the package."""
    return modulate if modulate is not _modulate else sys.modules[__package__].modulate


def modulates_as_usual() -> bool:
    return _modulate_in_force() is _modulate


def norm_modulate(norm: nn.Module, x, shift, scale, backends):
    """The norm of x, modulated: (B, N, D)."""
    if _is_fusible(norm):
        return ops.layer_norm_modulate(x, shift, scale, norm.eps, backend=backends)
    return _modulate_in_force()(norm(x), shift, scale)


def junction(carry: Carry, norm: nn.Module, shift, scale):
    """The tokens with the pending branch added, and their norm modulated: (B, N, D) each."""
    x, y, gate, bias, _, backends = carry
    if y is None or not _is_fusible(norm):
        x = add_pending(carry).x
        return x, norm_modulate(norm, x, shift, scale, backends)
    return ops.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, norm.eps, bias, backend=backends)


def _is_fusible(norm):
    """Whether ``norm`` is a LayerNorm over D without parameters, which the fused operations compute and modulate."""
    return modulates_as_usual() and is_bare_layer_norm(norm)
