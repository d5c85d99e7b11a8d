"""attention: softmax(q k^T * scale) v without a mask, on the packed output of the qkv Linear."""

import torch
import torch.nn.functional as F

from ditfast.ops import checks, reference
from ditfast.ops.backend import DTYPES, choose, note
from ditfast.ops.registration import define, differentiable, reject_double_backward, run


def attention(qkv, num_heads: int, scale: float | None = None, *, backend=None):
    """Multi-head self-attention over all tokens of a sample.

    Args:
        qkv: (B, N, 3*H*d), straight from the Linear: q of all heads, then k, then v.
        num_heads: H.
        scale: factor on the logits; None for ``d ** -0.5``.
        backend: see `ditfast.ops`; "sdpa" is PyTorch's, "host" this package's C++ twin for the CPU.

    Returns:
        (B, N, H*d) in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.
        RuntimeError: the backend asked for by name cannot run.

    Source: Vaswani et al., "Attention Is All You Need", equation 1.
    """
    head_dim = _check(qkv, num_heads)
    scale = head_dim**-0.5 if scale is None else float(scale)
    name = choose(_OP, backend, qkv.device.type, _unsupported(qkv, head_dim))
    if name == "host":
        return _call(qkv, num_heads, scale, name)[0]
    note(_OP, name)
    if name == "sdpa":
        return _sdpa(qkv, num_heads, scale)
    return reference.attention(qkv, num_heads, scale)


_OP = "attention"


def _check(qkv, num_heads):
    checks.tokens("qkv", qkv)
    checks.positive("num_heads", num_heads)
    if qkv.shape[1] == 0:
        raise ValueError(f"qkv must have N >= 1 tokens, got shape {tuple(qkv.shape)}")
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv must have a last size divisible by 3 * num_heads={3 * num_heads}, got {qkv.shape[-1]}")
    return qkv.shape[-1] // (3 * num_heads)


def _unsupported(qkv, head_dim):
    if qkv.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, got {qkv.dtype}"
    if head_dim > 256:
        return f"the kernels take a head dim of at most 256, got {head_dim}"
    return None


def _sdpa(qkv, num_heads, scale):
    b, n, width = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(b, n, width // 3)


def _rows(t):
    return t if t.stride(-1) == 1 else t.contiguous()


def _geometry(qkv, num_heads):
    b, n, width = qkv.shape
    return {
        "dtype": str(qkv.dtype).removeprefix("torch."),
        "batch": b,
        "tokens": n,
        "heads": num_heads,
        "head_dim": width // (3 * num_heads),
        "stride_b": qkv.stride(0),
        "stride_n": qkv.stride(1),
        "threads": torch.get_num_threads(),
    }


def _forward(qkv, num_heads, scale, backend):
    from ditfast import _C

    note(_OP, backend)
    qkv = _rows(qkv)
    out, lse = _forward_fake(qkv, num_heads, scale, backend)
    _C.attention_forward_host(
        qkv=qkv.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), scale=scale, **_geometry(qkv, num_heads)
    )
    return out, lse


def _forward_fake(qkv, num_heads, scale, backend):
    b, n, width = qkv.shape
    return qkv.new_empty(b, n, width // 3), qkv.new_empty(b, num_heads, n, dtype=torch.float32)


def _backward(dout, qkv, out, lse, scale, backend):
    from ditfast import _C

    note(_OP, backend)
    qkv = _rows(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    _C.attention_backward_host(
        dout=dout.data_ptr(),
        qkv=qkv.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        dqkv=dqkv.data_ptr(),
        dout_stride_b=dout.stride(0),
        dout_stride_n=dout.stride(1),
        dout_stride_c=dout.stride(2),
        scale=scale,
        **_geometry(qkv, lse.shape[1]),
    )
    return dqkv


def _backward_fake(dout, qkv, out, lse, scale, backend):
    return qkv.new_empty(qkv.shape)


_forward_op = define(
    "attention(Tensor qkv, int num_heads, float scale, str backend) -> (Tensor, Tensor)",
    _forward,
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
