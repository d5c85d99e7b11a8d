"""qkv_attention: the qkv Linear and attention in one autograd node."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ditfast.ops import checks, extension, gemm
from ditfast.ops.attention import OP as ATTENTION
from ditfast.ops.attention import (
    attend,
    attention_flops,
    choose_attention,
    heads_of,
    jvp_flops,
    run_backward,
    run_forward,
    run_jvp,
)
from ditfast.ops.autocast import linear_dtype
from ditfast.ops.backends.log import note
from ditfast.ops.op import Backend, Op
from ditfast.ops.registration import attach_autograd, is_tracked, register_op, reject_double_backward, run_in_backward
from ditfast.ops.tangents import linear_tangent, register_jvp


def qkv_attention(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    *,
    backend: Backend = None,
) -> Tensor:
    """Compute ``attention(h @ weight.T + bias, num_heads, scale)``.

    The GEMMs are the library's, or in float32 on some CPUs `ditfast.ops.gemm`'s. Attention's backward also computes
    the bias's gradient, which saves a pass over dqkv; the keys' part is zero, because a bias on the keys shifts all
    logits of a query alike. Without a kernel or that gradient, this is a Linear followed by `attention`.

    Args:
        h: (B, N, D) tokens.
        weight: (3*H*d, D), bias: (3*H*d,) or None of the Linear: q of all heads, then k, then v.
        num_heads: H.
        scale: factor on the logits; None for ``d ** -0.5``.
        backend: as for `ditfast.ops.attention`.

    Returns:
        (B, N, H*d) in the dtype of h; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.
    """
    head_dim = _check(h, weight, bias, num_heads)
    checks.factor("scale", scale)
    scale = head_dim**-0.5 if scale is None else float(scale)
    dtype = linear_dtype(h)
    name = choose_attention(OP, h, dtype, head_dim, scale, is_tracked((h, weight, bias)), backend)
    if name not in OP.kernels or bias is None or not is_tracked((bias,)):
        return attend(gemm.linear_with_autograd(h, weight, bias, (name,)), num_heads, scale, name)
    # cast here, as autocast would, so that autograd sees it; the bias's gradient is rounded once, to its own dtype
    return _call(h.to(dtype), weight.to(dtype), bias, num_heads, scale, name)[0]


def _check(h, weight, bias, num_heads):
    d, device = checks.tokens("h", h, 1)[2], h.device
    width = checks.weight("weight", weight, "(3*H*d, D)", d, device)
    head_dim = checks.heads("weight", width, num_heads, "first")
    if bias is not None:
        checks.tensor("bias", bias, "(3*H*d,)", (width,), device)
    checks.parameter_dtypes("h", h, weight=weight, bias=bias)
    return head_dim


def _takes_host(backend, weight):
    """Whether the products are `gemm`'s; attention's self-check does not cover them."""
    return backend == "host" and gemm.is_right(weight)


def _forward(h, weight, bias, num_heads, scale, backend):
    note(OP.name, backend)
    linear = gemm.linear if _takes_host(backend, weight) else F.linear
    rows = linear(h.reshape(-1, h.shape[-1]), weight, bias.to(h.dtype))
    qkv = rows.view(*h.shape[:2], weight.shape[0])  # (B, N, 3*H*d)
    out, lse = run_forward(qkv, num_heads, scale, backend)
    return out, qkv, lse


def _forward_fake(h, weight, bias, num_heads, scale, backend):
    qkv = h.new_empty(*h.shape[:2], weight.shape[0])
    out, lse = extension.empty_outputs(qkv, num_heads, backend)
    return out, qkv, lse


def _jvp(h, weight, bias, num_heads, scale, h_t, weight_t, bias_t, backend):
    note(OP.name, backend)
    linear, rows = gemm.linear if _takes_host(backend, weight) else F.linear, h.reshape(-1, h.shape[-1])
    h_t, bias_t = None if h_t is None else h_t.reshape(rows.shape), None if bias_t is None else bias_t.to(h.dtype)
    parts = linear(rows, weight, bias.to(h.dtype)), linear_tangent(rows, weight, h_t, weight_t, bias_t, linear)
    qkv, qkv_t = (t.reshape(*h.shape[:2], -1) for t in parts)  # (B, N, 3*H*d) each
    out, lse, out_t = run_jvp(qkv, num_heads, scale, qkv_t, backend)
    return out, qkv, lse, out_t


def _backward(dout, h, weight, qkv, out, lse, needs, bias_dtype, scale, backend):
    note(OP.name, backend)
    dqkv, dbias = run_backward(dout, qkv, out, lse, scale, backend, bias_dtype)
    rows = dqkv.view(-1, weight.shape[0])  # (B*N, 3*H*d)
    matmul = gemm.matmul if _takes_host(backend, weight) else torch.matmul
    return (
        matmul(rows, weight).view(h.shape) if needs[0] else rows.new_empty(0),
        matmul(rows.t(), h.reshape(-1, h.shape[-1])) if needs[1] else rows.new_empty(0),
        dbias,
    )


def _backward_fake(dout, h, weight, qkv, out, lse, needs, bias_dtype, scale, backend):
    dh, dweight = (qkv.new_empty(t.shape if need else (0,)) for t, need in zip((h, weight), needs, strict=True))
    return dh, dweight, qkv.new_empty(weight.shape[:1], dtype=bias_dtype)


_forward_op = register_op(
    "qkv_attention(Tensor h, Tensor weight, Tensor bias, int num_heads, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    {"h": "B,N,D", "weight": "W,D h", "bias": "W"},
    sample_dims=(0, 0, 0),
    shared=("weight", "bias"),
)
_backward_op = register_op(
    "qkv_attention_backward(Tensor dout, Tensor h, Tensor weight, Tensor qkv, Tensor out, Tensor lse, bool[] needs,"
    " ScalarType bias_dtype, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    {
        "out": "B,N,E dense qkv",
        "qkv": "B,N,3E",
        "h": "B,N,D qkv",
        "weight": "3E,D qkv",
        "dout": "B,N,E qkv",
        "lse": "B,H,N dense wide:qkv",
    },
)


def _setup_context(ctx, inputs, output):
    h, weight, bias, _, ctx.scale, ctx.backend = inputs
    out, qkv, lse = output
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(h, weight, qkv, out, lse)
    ctx.mark_non_differentiable(qkv, lse)
    ctx.set_materialize_grads(False)  # qkv and lse have none: do not allocate zeros for them


def _autograd_backward(ctx, dout, _dqkv, _dlse):
    needs = ctx.needs_input_grad[:3]
    rest = list(needs[:2]), ctx.bias_dtype, ctx.scale, ctx.backend
    grads = run_in_backward(_backward_op, dout, *ctx.saved_tensors, *rest)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


reject_double_backward("qkv_attention", _backward_op)
_with_tangents = register_jvp(_forward_op, _jvp, _setup_context, _autograd_backward, outputs=1)
_call = attach_autograd("qkv_attention", _forward_op, _setup_context, _autograd_backward, _with_tangents)


def _arguments(t, batch, tokens, dim):
    return {
        "h": t(batch, tokens, dim, spread=3.0),
        "weight": t(3 * dim, dim, spread=0.3 * dim**-0.5),  # h has a larger spread than a norm's output
        "bias": t(3 * dim, spread=0.5),
        "num_heads": heads_of(dim),
    }


def _flops(h, weight, *_, **__):
    return 2 * prod(h[:-1]) * prod(weight) + attention_flops((*h[:-1], weight[0]))


def _backward_flops(dout, h, weight, qkv, out, lse, needs, *_, **__):
    return 2 * prod(h[:-1]) * prod(weight) * (needs[0] + needs[1]) + 2 * attention_flops(qkv)


def _jvp_flops(h, weight, bias, num_heads, scale, h_t, weight_t, *_, **__):
    linears = 1 + (h_t is not None) + (weight_t is not None)
    return 2 * prod(h[:-1]) * prod(weight) * linears + jvp_flops((*h[:-1], weight[0]))


OP = Op(
    name="qkv_attention",
    function=qkv_attention,
    backends=ATTENTION.backends,
    arguments=_arguments,
    outputs=("out",),
    parameters=("weight", "bias"),
    self_check=None,  # covered by attention's
    flops={"qkv_attention": _flops, "qkv_attention_backward": _backward_flops, "qkv_attention_jvp": _jvp_flops},
)
