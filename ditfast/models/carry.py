"""The residual stream between blocks, with the last branch still to be added.

A block ends with ``x + gate * branch`` and the next begins with a LayerNorm of that sum. If the block passes on the
branch instead of the sum, one pass, the junction, does both.
"""

import sys
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ditfast import ops
from ditfast.models.limits import check_tensors
from ditfast.models.plain import is_bare_layer_norm, is_plain, parameter
from ditfast.ops.gemm import linear_with_autograd


class Carry(NamedTuple):
    """What blocks exchange in place of tokens: those are ``x + gate * (y + bias)``, or x if y is None."""

    x: Tensor  # (B, N, D)
    y: Tensor | None  # (B, N, D) pending branch
    gate: Tensor | None  # (B, D); None only if y is
    bias: Tensor | None  # (D,) of the Linear that computed y
    silu_c: Tensor  # (B, D) SiLU of the conditioning, shared by all blocks
    backends: tuple[str, ...]  # in force when the forward began, so that recomputation in backward uses them too


def start_carry(x: Tensor, c: Tensor, backends: tuple[str, ...]) -> Carry:
    """Wrap tokens x (B, N, D) and conditioning c (B or 1, D).

    Raises:
        TypeError: one of them is no dense tensor.
    """
    check_tensors(x=x, c=c)
    return Carry(x, None, None, None, F.silu(c), backends)


def set_pending(carry: Carry, x: Tensor, y: Tensor | None, gate: Tensor | None, bias: Tensor | None) -> Carry:
    """Leave ``gate * (y + bias)`` for the next junction to add to x."""
    return Carry(x, y, gate, bias, carry.silu_c, carry.backends)


def pending_bias(bias: Tensor | None) -> Tensor | None:
    """The bias of a block's last Linear as the next block may read it: FSDP may free the parameter in between."""
    return bias.clone() if bias is not None and dist.is_available() and dist.is_initialized() else bias


def add_pending(state: Tensor | Carry) -> Tensor | Carry:
    """Add the pending branch of a `Carry`; tokens are returned unchanged."""
    if not isinstance(state, Carry) or state.y is None:
        return state
    x, y, gate, bias, _, backends = state
    x = ops.gated_residual(x, y, gate, bias, backend=backends)  # type: ignore[arg-type]  # y has a gate
    return set_pending(state, x, None, None, None)


def as_tokens(state: Tensor | Carry) -> Tensor:
    """The tokens (B, N, D) of a `Carry`; tokens are returned unchanged."""
    state = add_pending(state)
    return state.x if isinstance(state, Carry) else state


def modulation(adaln: nn.Module, c: Tensor, carry: Carry) -> Tensor:
    """Compute shifts, scales and gates from the conditioning c with ``adaln``, side by side: (B, parts * D)."""
    if is_plain(adaln, nn.Sequential):
        layers: tuple[Any, ...] = tuple(adaln._modules.values())
        if len(layers) == 2 and is_plain(layers[0], nn.SiLU):
            return _call_linear(layers[1], carry.silu_c, carry.backends)
    return adaln(c)


def _call_linear(layer: nn.Module, x, backends):
    if not is_plain(layer, nn.Linear):
        return layer(x)
    return linear_with_autograd(x, parameter(layer, "weight"), parameter(layer, "bias"), backends)


def split_rows(rows: Tensor, parts: int, x: Tensor) -> tuple[Tensor, ...]:
    """Split rows (B or 1, parts * D) into parts (B, D) for the samples of x."""
    # not chunk: some quantized tensors give chunks the shape of the whole
    return one_per_sample(rows, x).unflatten(1, (parts, -1)).unbind(1)


def one_per_sample(rows: Tensor, x: Tensor) -> Tensor:
    """Rows (B, ...) for the samples of x; a single row (1, ...) is expanded."""
    batch = x.shape[0]
    return rows.expand(batch, *rows.shape[1:]) if rows.shape[0] == 1 != batch else rows


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute ``x * (1 + scale) + shift`` with one row per sample: x (B, N, D); shift, scale (B, D).

    Source: Peebles & Xie, section 3.2, "adaLN block".
    """
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


_modulate = modulate  # what the fused operations compute


def _modulate_in_force():
    """`modulate`, or whatever was monkeypatched over it, here or in the package."""
    return modulate if modulate is not _modulate else sys.modules[__package__].modulate


def modulates_as_usual() -> bool:
    """Whether `modulate` is not monkeypatched."""
    return _modulate_in_force() is _modulate


def norm_modulate(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, backends: tuple[str, ...]) -> Tensor:
    """Normalize x with a module and modulate it: (B, N, D)."""
    if _is_fusible(norm):
        return ops.layer_norm_modulate(x, shift, scale, norm.eps, backend=backends)
    return _modulate_in_force()(norm(x), shift, scale)


def junction(carry: Carry, norm: Any, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Add the pending branch; return the tokens and their modulated norm, (B, N, D) each."""
    x, y, gate, bias, _, backends = carry
    if y is None or not _is_fusible(norm):
        x = as_tokens(carry)
        return x, norm_modulate(norm, x, shift, scale, backends)
    return ops.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, norm.eps, bias, backend=backends)  # type: ignore[arg-type]


def _is_fusible(norm):
    """Whether ``norm`` is a parameter-free LayerNorm over D, which the fused operations can replace."""
    return modulates_as_usual() and is_bare_layer_norm(norm)
