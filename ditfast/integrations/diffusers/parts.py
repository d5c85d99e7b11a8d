"""Parts of diffusers' blocks on this package's operations; shapes as in `ditfast.ops`.

Modules of diffusers are `Any`: their attributes are only known once `why_not_*` has checked them.
"""

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from ditfast import ops
from ditfast.integrations.diffusers.known import remember, why_unknown
from ditfast.models.carry import one_per_sample, split_rows
from ditfast.models.linears import call_linears
from ditfast.models.plain import is_bare_layer_norm, is_plain, parameter
from ditfast.ops import tangents

Branch = tuple[torch.Tensor, torch.Tensor | None]  # output without the last Linear's bias, and that bias

for _cls in (Attention, FeedForward, GELU):
    remember(_cls)
_PROCESSORS: dict[type, Any] = {
    cls: cls.__call__ for cls in (AttnProcessor2_0, JointAttnProcessor2_0) if why_unknown(cls) is None
}


def why_not_plain(name: str, module: nn.Module, cls: type) -> str | None:
    """Why the part ``name`` is not a ``cls`` with known code and without hooks; None if it is."""
    if is_plain(module, cls):
        return None
    if type(module) is cls:
        return f"{name} has hooks, a replaced forward, special parameters or unknown code"
    return f"{name} is a {type(module).__name__}"


def why_not_bare(name: str, norm: nn.Module) -> str | None:
    """Why a norm cannot be fused with its modulation; None if it can."""
    if is_bare_layer_norm(norm):
        return None
    return why_not_plain(name, norm, nn.LayerNorm) or f"{name} has parameters, or more than one dimension"


def fits(x: torch.Tensor, emb: torch.Tensor | None) -> bool:
    """Whether x and emb are tokens (B, N, D) and their conditioning, (B, D) or (1, D)."""
    if emb is None or x.dim() != 3 or emb.dim() != 2:
        return False
    return emb.shape[0] == x.shape[0] or emb.shape[0] == 1


def rows_of(norm: Any, emb: torch.Tensor, parts: int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The shifts, scales and gates, (B, D) each, that a diffusers norm computes from the conditioning."""
    return split_rows(call_linears(norm.linear, norm.silu(emb)), parts, x)


def modulated(
    x: torch.Tensor, norm: nn.LayerNorm, shift: torch.Tensor, scale: torch.Tensor, backends: tuple[str, ...]
) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift, in the dtype of diffusers' formula."""
    shift, scale = one_per_sample(shift, x), one_per_sample(scale, x)
    return ops.layer_norm_modulate(widened(x, shift, scale), shift, scale, norm.eps, backend=backends)


def residual(x: torch.Tensor, branch: Branch, gate: torch.Tensor, backends: tuple[str, ...]) -> torch.Tensor:
    """x + gate * (y + bias) for a branch (y, bias)."""
    y, bias = branch
    return ops.gated_residual(widened(x, y, gate), y, gate, bias, backend=backends)


def junction(
    x: torch.Tensor,
    branch: Branch,
    gate: torch.Tensor,
    norm: nn.LayerNorm,
    shift: torch.Tensor,
    scale: torch.Tensor,
    backends: tuple[str, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual` and `modulated` in one pass: returns the new x and the next branch's input."""
    y, bias = branch
    x = widened(x, y, gate)
    return ops.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, norm.eps, bias, backend=backends)


def widened(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """x promoted to the dtype of a sum with the others; the operations alone would keep x's."""
    dtype = x.dtype
    for t in others:
        dtype = torch.promote_types(dtype, t.dtype)
    return x.to(dtype)


def self_attention(attn: Any, h: torch.Tensor, backends: tuple[str, ...], **kwargs: Any) -> Branch:
    """Self-attention: returns (output without the last Linear's bias, that bias, or None if already added).

    Args:
        attn: diffusers' ``Attention``.
        kwargs: further arguments; if any is not None, ``attn`` itself is called.
    """
    if any(value is not None for value in kwargs.values()) or why_not_attention(attn) is not None:
        return attn(hidden_states=h, **kwargs), None
    linears = attn.to_q, attn.to_k, attn.to_v
    weight = torch.cat([parameter(layer, "weight") for layer in linears])  # (3*H*d, D)
    biases = [parameter(layer, "bias") for layer in linears]
    bias = None if biases[0] is None else torch.cat(biases)  # (3*H*d,)
    out = ops.qkv_attention(h, weight, bias, attn.heads, backend=backends)  # (B, N, H*d)
    return tangents.linear(out, parameter(attn.to_out[0], "weight")), parameter(attn.to_out[0], "bias")


def why_not_attention(attn: Any) -> str | None:
    """Why self-attention is left to ``attn`` itself; None if it is not."""
    reason = why_not_plain("it", attn, Attention)
    if reason is not None:
        return reason
    processor = type(attn.processor)
    if _PROCESSORS.get(processor) is not processor.__call__:
        return f"its processor is a {processor.__name__}"
    if not (attn.norm_q is attn.norm_k is attn.spatial_norm is attn.group_norm is attn.to_add_out is None):
        return "it has norms or an output for another stream"
    if attn.residual_connection or attn.rescale_output_factor != 1:
        return "it adds its input or rescales its output"
    q, k, v = attn.to_q, attn.to_k, attn.to_v
    out, drop = attn.to_out[0], attn.to_out[1]
    for name, layer in (("to_q", q), ("to_k", k), ("to_v", v), ("to_out.0", out)):
        reason = reason or why_not_plain(name, layer, nn.Linear)
    if reason is not None:
        return reason
    if not q.weight.shape == k.weight.shape == v.weight.shape:
        return "q, k and v differ in shape"
    if not (q.bias is None) == (k.bias is None) == (v.bias is None):
        return "some of q, k and v have a bias"
    return _why_not_closed("to_out.1", drop)


def feed_forward(ff: Any, h: torch.Tensor, backends: tuple[str, ...]) -> Branch:
    """The MLP: returns (output without the last Linear's bias, that bias, or None if already added)."""
    if why_not_feed_forward(ff) is not None:
        return ff(h), None
    first, last = ff.net[0].proj, ff.net[2]
    weights = parameter(first, "weight"), parameter(first, "bias"), parameter(last, "weight")
    return ops.mlp(h, *weights, backend=backends), parameter(last, "bias")


def why_not_feed_forward(ff: Any) -> str | None:
    """Why an MLP is left to ``ff`` itself; None if it is not."""
    reason = why_not_plain("it", ff, FeedForward) or why_not_plain("net.0", ff.net[0], GELU)
    if reason is not None:
        return reason
    project, last = ff.net[0], ff.net[2]
    reason = why_not_plain("net.0.proj", project.proj, nn.Linear) or why_not_plain("net.2", last, nn.Linear)
    if reason is None and (project.approximate != "tanh" or project.proj.bias is None):
        return "net.0 is not a GELU (tanh) of a Linear with bias"
    for i in range(1, len(ff.net), 2):  # after each Linear
        reason = reason or _why_not_closed(f"net.{i}", ff.net[i])
    return reason


def _why_not_closed(name: str, drop: Any) -> str | None:
    """Why a Dropout is active; None if it is not."""
    reason = why_not_plain(name, drop, nn.Dropout)
    return reason or (f"{name} drops" if drop.training and drop.p > 0 else None)
