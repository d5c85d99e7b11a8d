"""attention: softmax(q k^T * scale) v without a mask, on the packed output of the qkv Linear."""

import warnings
from functools import cache

import torch
import torch.nn.functional as F

from ditfast.ops import checks, explicit, extension, fastest, reference
from ditfast.ops.backend import DTYPES, choose, note
from ditfast.ops.registration import define, differentiable, reject_double_backward, run


def attention(qkv, num_heads: int, scale: float | None = None, *, backend=None):
    """Multi-head self-attention over all tokens of a sample.

    Args:
        qkv: (B, N, 3*H*d), straight from the Linear: q of all heads, then k, then v.
        num_heads: H.
        scale: factor on the logits; None for ``d ** -0.5``.
        backend: see `ditfast.ops`; "sdpa" is PyTorch's, "cuda" and "triton" this package's kernels for d = 64 and
            72, "host" their plain C++ twin on the CPU. Automatic: the fastest that is right on this machine.

    Returns:
        (B, N, H*d) in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.
        RuntimeError: the backend asked for by name cannot run.

    Source: Vaswani et al., "Attention Is All You Need", equation 1.
    """
    head_dim = _check(qkv, num_heads)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return attend(qkv, num_heads, scale, select(_OP, qkv, qkv.dtype, head_dim, scale, backend))


_OP = "attention"
KERNELS = ("cuda", "triton", "host")


def attend(qkv, num_heads, scale, name):
    """`attention` of checked arguments on the backend ``name``."""
    if name in KERNELS:
        return _call(qkv, num_heads, scale, name)[0]
    note(_OP, name)
    if name == "sdpa":
        return _sdpa(qkv, num_heads, scale)
    return reference.attention(qkv, num_heads, scale)


def _check(qkv, num_heads):
    checks.tokens("qkv", qkv)
    checks.positive("num_heads", num_heads)
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv must have N >= 1 tokens, got shape {tuple(qkv.shape)}")
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv must have a last size divisible by 3 * num_heads={3 * num_heads}, got {qkv.shape[-1]}")
    return qkv.shape[-1] // (3 * num_heads)


def select(op, t, dtype, head_dim, scale, requested):
    """The backend of ``op``; the automatic choice takes a kernel where it is right and fastest, else PyTorch's.

    Args:
        t: qkv, or the tokens (B, N, D) from which a Linear will make it.
        dtype: of qkv.
    """
    reasons = {name: _unsupported(name, dtype, head_dim, scale) for name in KERNELS}
    name = choose(op, requested, t.device.type, reasons)
    if name != "auto":
        return name
    if dtype == torch.float32 or any(reasons[k] for k in ("cuda", "triton")):
        return "sdpa"
    if not torch.compiler.is_compiling():
        if type(t) not in (torch.Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
            return "sdpa"  # nothing to measure on, such as a fake tensor
        if op == _OP and not extension.is_aligned(extension.unit_stride(t)):  # what a Linear makes is aligned
            _warn_unaligned()
            return "sdpa"
    return fastest.choose(dtype, head_dim, t.shape[1], t.device)


def _unsupported(name, dtype, head_dim, scale):
    """Why a kernel cannot take such a tensor; None if it can."""
    dtypes = DTYPES[1:] if name == "cuda" else DTYPES
    if dtype not in dtypes:
        return f"it takes {', '.join(str(t).removeprefix('torch.') for t in dtypes)}, got {dtype}"
    if name == "cuda" and scale <= 0:
        return f"it takes a positive scale, got {scale}"
    if name == "host" and head_dim > 256:
        return f"it takes a head dim of at most 256, got {head_dim}"
    if name != "host" and head_dim not in (64, 72):
        return f"it takes a head dim of 64 or 72, got {head_dim}"
    return None


@cache
def _warn_unaligned():
    warnings.warn(
        "ditfast: attention runs on PyTorch's, because the rows of qkv do not begin at multiples of 16 bytes",
        RuntimeWarning,
        stacklevel=4,
    )


def _sdpa(qkv, num_heads, scale):
    b, n, width = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, num_heads, width // (3 * num_heads))).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(b, n, width // 3)


def forward(qkv, num_heads, scale, backend):
    note(_OP, backend)
    if backend == "triton":
        from ditfast.kernels import attention as kernel

        return kernel.forward(extension.unit_stride(qkv), num_heads, scale)
    return _FORWARD[backend](qkv, num_heads, scale)


def _forward_fake(qkv, num_heads, scale, backend):
    return extension.empty_outputs(qkv, num_heads)


def gradients(dout, qkv, out, lse, scale, backend, bias_dtype=None):
    """dqkv, contiguous, and its sum over B and N in ``bias_dtype``; None without one."""
    note(_OP, backend)
    if backend == "triton":
        from ditfast.kernels import attention as kernel

        return kernel.backward(extension.unit_stride(dout), extension.unit_stride(qkv), out, lse, scale, bias_dtype)
    return _BACKWARD[backend](dout, qkv, out, lse, scale, bias_dtype)


def _backward(dout, qkv, out, lse, scale, backend):
    return gradients(dout, qkv, out, lse, scale, backend)[0]


def _backward_fake(dout, qkv, out, lse, scale, backend):
    return qkv.new_empty(qkv.shape)


_FORWARD = {"cuda": extension.cuda_forward, "host": extension.host_forward, "reference": explicit.attention}
_BACKWARD = {
    "cuda": extension.cuda_backward,
    "host": extension.host_backward,
    "reference": explicit.attention_backward,
}
_forward_op = define(
    "attention(Tensor qkv, int num_heads, float scale, str backend) -> (Tensor, Tensor)",
    forward,
    _forward_fake,
)
_backward_op = define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    qkv, _, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _autograd_backward(ctx, dout, _dlse):
    return run(_backward_op, dout, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


reject_double_backward(_OP, _backward_op)
_call = differentiable(_OP, _forward_op, _setup_context, _autograd_backward)
