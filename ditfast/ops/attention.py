"""attention: softmax(q k^T * scale) v without a mask, on the packed output of the qkv Linear."""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.kernels.strides import unit_stride
from ditfast.ops import checks, extension, fallback, reference
from ditfast.ops.backends import fastest, on_cpu
from ditfast.ops.backends.availability import KERNEL_DTYPES, device_type, why_not
from ditfast.ops.backends.choice import choose
from ditfast.ops.backends.log import note
from ditfast.ops.backends.selfcheck import is_right
from ditfast.ops.op import WITHOUT_STREAM, Backend, Op
from ditfast.ops.registration import attach_autograd, is_tracked, register_op, reject_double_backward, run_in_backward
from ditfast.ops.sdpa import sdpa_of_packed
from ditfast.ops.tangents import register_jvp


def attention(qkv: Tensor, num_heads: int, scale: float | None = None, *, backend: Backend = None) -> Tensor:
    """Compute multi-head self-attention over all tokens of a sample.

    Args:
        qkv: (B, N, 3*H*d), straight from the Linear: q of all heads, then k, then v.
        num_heads: H.
        scale: factor on the logits; None for ``d ** -0.5``.
        backend: see `ditfast.ops`; "sdpa" is PyTorch's, "cuda" and "triton" are kernels for d = 64 and 72, "host" is
            C++ on the CPU for any d <= 256. Automatic: the fastest that is correct on this machine. Under
            forward-mode AD, "cuda" and the automatic choice on a GPU compute output and tangent with "triton".

    Returns:
        (B, N, H*d) in the dtype of qkv.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype or shape.
        RuntimeError: a backend chosen by name cannot run.

    Source: Vaswani et al., "Attention Is All You Need", equation 1.
    """
    head_dim = _check(qkv, num_heads)
    checks.factor("scale", scale)
    scale = head_dim**-0.5 if scale is None else float(scale)
    name = choose_attention(OP, qkv, qkv.dtype, head_dim, scale, is_tracked((qkv,)), backend)
    return attend(qkv, num_heads, scale, name)


def attend(qkv: Tensor, num_heads: int, scale: float, name: str) -> Tensor:
    """`attention` on the backend ``name``; the arguments are already checked."""
    if name in OP.kernels:
        return _call(qkv, num_heads, scale, name)[0]
    note(OP.name, name)
    if name == "sdpa":
        return sdpa_of_packed(qkv, num_heads, scale)
    return reference.attention(qkv, num_heads, scale)


def _check(qkv, num_heads):
    return checks.heads("qkv", checks.tokens("qkv", qkv, 1)[2], num_heads)


def choose_attention(
    op: Op, t: Tensor, dtype: torch.dtype, head_dim: int, scale: float, training: bool, requested: Backend
) -> str:
    """Choose the backend of ``op``; automatically, a kernel where it is correct and fastest, else PyTorch's.

    Args:
        op: `attention`, or the operation that calls it.
        t: qkv, or the tokens (B, N, D) from which a Linear will compute it.
        dtype: of qkv.
        training: whether gradients are needed.
    """

    def unsupported(name):
        return _unsupported(name, dtype, head_dim, scale)

    def takes_host(is_able):
        return on_cpu.takes_host(OP, dtype, dtype, head_dim, t.shape[0] * t.shape[1] * head_dim, is_able)

    name = choose(op, requested, device_type(t), unsupported, takes_host)
    if forward_ad._current_level >= 0 and name in ("auto", "cuda"):
        return _choose_for_tangents(op, name, t.device, dtype, head_dim, unsupported("triton"))
    if name != "auto":
        return name
    if unsupported("cuda") or unsupported("triton"):
        return "sdpa"
    if not torch.compiler.is_compiling():
        if type(t) not in (Tensor, torch.nn.Parameter) or torch._C._are_functorch_transforms_active():
            return "sdpa"  # not real memory to time on, e.g. a fake tensor
        if op is OP and t.stride(-1) == 1 and not extension.is_aligned(t):  # a Linear's output is aligned
            _warn_unaligned()
            return "sdpa"
    return _fastest(dtype, head_dim, t.shape[1], training, t.device)


def _choose_for_tangents(op, name, device, dtype, head_dim, reason):
    """On a GPU, tangents come from the Triton kernel; ``reason`` says why it cannot take this tensor."""
    reason = reason or why_not(OP, "triton", device.type)
    if name == "auto":
        return "triton" if reason is None and _is_right(dtype, head_dim, device) else "sdpa"
    if reason is not None:
        raise RuntimeError(f"{op.name}: backend 'cuda' cannot run: its tangents come from 'triton': {reason}")
    return name


def _is_right(dtype, head_dim, device):
    return is_right(OP, "triton", dtype, dtype, head_dim, device)


def _fastest(dtype, head_dim, tokens, training, device):
    return fastest.fastest_backend(OP, _make_run, dtype, head_dim, tokens, training, device)


for _function in (_fastest, _is_right):  # as torch.compiler.assume_constant_result, without importing the compiler
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def _make_run(t, batch, tokens, head_dim, backend, training):
    """Return a function that runs 16-head attention forward and, if training, backward."""
    qkv = t(batch, tokens, 3 * 16 * head_dim).requires_grad_(training)

    def run():
        out = attention(qkv, 16, backend=backend)
        if training:
            torch.autograd.grad(out, qkv, out.detach())

    return run


def _unsupported(name, dtype, head_dim, scale):
    """Why a kernel cannot take such a tensor; None if it can."""
    dtypes = KERNEL_DTYPES[1:] if name == "cuda" else KERNEL_DTYPES
    if dtype not in dtypes:
        return f"it supports {', '.join(str(t).removeprefix('torch.') for t in dtypes)}, got {dtype}"
    if name == "cuda" and scale <= 0:
        return f"it needs a positive scale, got {scale}"
    if name == "host" and head_dim > 256:
        return f"it supports head dims up to 256, got {head_dim}"
    if name != "host" and head_dim not in (64, 72):
        return f"it supports head dims 64 and 72, got {head_dim}"
    return None


@cache
def _warn_unaligned():
    warnings.warn(
        "ditfast: attention falls back to PyTorch's, because the rows of qkv are not aligned to 16 bytes",
        RuntimeWarning,
        stacklevel=4,
    )


def _begin(qkv, num_heads, backend):
    checks.heads("qkv", qkv.shape[2], num_heads)
    if backend in ("auto", "sdpa"):
        raise ValueError(f"backend must be that of a running attention, a kernel or reference, got {backend!r}")
    note(OP.name, backend)


def run_forward(qkv: Tensor, num_heads: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse; called inside a running operation."""
    _begin(qkv, num_heads, backend)
    if backend == "triton":
        from ditfast.kernels import attention as kernel

        return kernel.forward(unit_stride(qkv), num_heads, scale)
    return _FORWARD[backend](qkv, num_heads, scale)


def _forward_fake(qkv, num_heads, scale, backend):
    return extension.empty_outputs(qkv, num_heads, backend)


def run_jvp(qkv: Tensor, num_heads: int, scale: float, qkv_t: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the tangent of out; called inside a running operation."""
    backend = "triton" if backend == "cuda" else backend  # "cuda" has no JVP
    _begin(qkv, num_heads, backend)
    if backend == "triton":
        from ditfast.kernels import attention_jvp as kernel

        return kernel.jvp(unit_stride(qkv), unit_stride(qkv_t), num_heads, scale)
    return _JVP[backend](qkv, qkv_t, num_heads, scale)


def run_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, backend: str, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Contiguous dqkv, and its sum over B and N in ``bias_dtype`` if given; called inside a running operation."""
    _begin(qkv, lse.shape[1] // (2 if backend == "host" else 1), backend)
    if backend == "triton":
        from ditfast.kernels import attention as kernel

        return kernel.backward(unit_stride(dout), unit_stride(qkv), out, lse, scale, bias_dtype)
    return _BACKWARD[backend](dout, qkv, out, lse, scale, bias_dtype)


def _backward(dout, qkv, out, lse, scale, backend):
    return run_backward(dout, qkv, out, lse, scale, backend, None)[0]


def _backward_fake(dout, qkv, out, lse, scale, backend):
    return qkv.new_empty(qkv.shape)


_FORWARD = {"cuda": extension.cuda_forward, "host": extension.host_forward, "reference": fallback.attention}
_JVP = {"host": extension.host_jvp, "reference": fallback.attention_jvp}
_BACKWARD = {
    "cuda": extension.cuda_backward,
    "host": extension.host_backward,
    "reference": fallback.attention_backward,
}
_forward_op = register_op(
    "attention(Tensor qkv, int num_heads, float scale, str backend) -> (Tensor, Tensor)",
    run_forward,
    _forward_fake,
    {"qkv": "B,N,W"},
    sample_dims=(0, 0),
)
_backward_op = register_op(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, float scale, str backend) -> Tensor",
    _backward,
    _backward_fake,
    {"out": "B,N,E dense qkv", "qkv": "B,N,3E", "lse": "B,H,N dense wide:qkv", "dout": "B,N,E qkv"},
    sample_dims=(0,),
)


def _setup_context(ctx, inputs, output):
    qkv, _, ctx.scale, ctx.backend = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse)
    ctx.mark_non_differentiable(lse)


def _autograd_backward(ctx, dout, _dlse):
    return run_in_backward(_backward_op, dout, *ctx.saved_tensors, ctx.scale, ctx.backend), None, None, None


reject_double_backward("attention", _backward_op)
_with_tangents = register_jvp(_forward_op, run_jvp, _setup_context, _autograd_backward, outputs=1)
_call = attach_autograd("attention", _forward_op, _setup_context, _autograd_backward, _with_tangents)


def heads_of(dim: int) -> int:
    """Heads of a test problem: of 72 where that divides D, as in DiT-XL, else of 64."""
    return max(1, dim // (72 if dim % 72 == 0 else 64))


def _arguments(t, batch, tokens, dim):
    return {"qkv": t(batch, tokens, 3 * dim), "num_heads": heads_of(dim)}


def _self_check(t, head_dim, backend):
    samples, tokens = t.size[0], t.size[1] // 3  # several tiles and a remainder
    qkv, dout = t(samples, tokens, 3 * 2 * head_dim), t(samples, tokens, 2 * head_dim)
    scale = head_dim**-0.5
    out, lse = run_forward(qkv, 2, scale, backend)
    plain, _ = run_backward(dout, qkv, out, lse, scale, backend, None)
    dqkv, dbias = run_backward(dout, qkv, out, lse, scale, backend, t.branch)  # another code path
    dq, dk, dv = torch.cat((plain, dqkv), dim=1).chunk(3, dim=-1)
    result = {"out": out, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
    if backend != "host":  # which keeps it in two parts
        result["lse"] = lse
    if backend != "cuda":
        result["out_t"] = run_jvp(qkv, 2, scale, t(*qkv.shape), backend)[-1]
    return result


def attention_flops(qkv: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of q k^T and p v."""
    b, n, width = qkv
    return 2 * 2 * b * n * n * (width // 3)


def jvp_flops(qkv: Sequence[int], *_: object, **__: object) -> int:
    """FLOPs of q k^T, p v and the four products in their tangents."""
    return 3 * attention_flops(qkv)


OP = Op(
    name="attention",
    function=attention,
    backends={"cuda": ("bf16", "fp16"), **dict.fromkeys(("triton", "sdpa", "host", "reference"), WITHOUT_STREAM)},
    arguments=_arguments,
    outputs=("out",),
    parameters=("bias",),  # of the Linear that computed qkv
    self_check=_self_check,
    auto_precisions=("bf16", "fp16"),  # automatically, float32 runs on SDPA
    widths=lambda hidden_size: (64, 72),
    flops={
        "attention": attention_flops,
        "attention_backward": lambda dout, qkv, *_, **__: 2 * attention_flops(qkv),
        "attention_jvp": jvp_flops,
    },
    moved={"fwd": ("qkv", "out"), "bwd": ("qkv", "out", "dout", "dqkv")},
)
