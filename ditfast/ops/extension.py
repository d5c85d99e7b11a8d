"""Calls into the C++ extension, which takes pointers and strides, not tensors."""

import torch
from torch import Tensor

from ditfast.kernels.strides import unit_stride
from ditfast.ops.addresses import contiguous, strided, with_unit_stride
from ditfast.ops.fallback import wide


def empty_outputs(qkv: Tensor, num_heads: int, backend: str) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, N, H*d) and lse (B, H, N), the log-sum-exp of the logits, in float32 (or float64).

    "host" keeps lse in two parts, (B, 2*H, N): the largest logits (in units of ln 2 unless qkv is float32), then
    1 / the sums of exp(logit - largest). Rounded to one number, it would move all weights of a query alike when
    backward computes them again.
    """
    b, n, width = qkv.shape
    rows = 2 * num_heads if backend == "host" else num_heads
    return qkv.new_empty(b, n, width // 3), qkv.new_empty(b, rows, n, dtype=wide(qkv.dtype))


def host_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    from ditfast import _C

    qkv = unit_stride(qkv)
    out, lse = empty_outputs(qkv, num_heads, "host")
    pointers = {"qkv": with_unit_stride("qkv", qkv, qkv.dtype, qkv.shape), **_pointers(out=out, lse=lse)}
    _C.attention_forward_host(**pointers, **_geometry(qkv, num_heads), scale=scale, threads=torch.get_num_threads())
    return out, lse


def host_jvp(qkv: Tensor, qkv_t: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse, and the tangent of out."""
    from ditfast import _C

    qkv, qkv_t = unit_stride(qkv), unit_stride(qkv_t)
    out, lse = empty_outputs(qkv, num_heads, "host")
    out_t = out.new_empty(*out.shape)
    inputs = {name: with_unit_stride(name, t, qkv.dtype, qkv.shape) for name, t in (("qkv", qkv), ("qkv_t", qkv_t))}
    pointers = inputs | _pointers(out=out, lse=lse, out_t=out_t)
    strides = {"qkv_t_stride_b": qkv_t.stride(0), "qkv_t_stride_n": qkv_t.stride(1)}
    geometry = _geometry(qkv, num_heads)
    _C.attention_jvp_host(**pointers, **geometry, **strides, scale=scale, threads=torch.get_num_threads())
    return out, lse, out_t


def host_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    from ditfast import _C

    qkv = unit_stride(qkv)
    (b, n, width), dtype, num_heads = qkv.shape, qkv.dtype, lse.shape[1] // 2
    inputs = {
        "qkv": with_unit_stride("qkv", qkv, dtype, qkv.shape),
        "dout": strided("dout", dout, dtype, (b, n, width // 3)),
        "out": contiguous("out", out, dtype, (b, n, width // 3)),
        "lse": contiguous("lse", lse, torch.float32, (b, 2 * num_heads, n)),
    }
    dqkv = qkv.new_empty(*qkv.shape)
    strides = dict(zip(("dout_stride_b", "dout_stride_n", "dout_stride_c"), dout.stride(), strict=True))
    sums = _dbias_buffer(qkv, 1, bias_dtype)
    pointers = inputs | _pointers(dqkv=dqkv, **sums)
    geometry = _geometry(qkv, num_heads)
    _C.attention_backward_host(**pointers, **geometry, **strides, scale=scale, threads=torch.get_num_threads())
    return dqkv, sums["dbias"].sum(0).to(bias_dtype) if sums else None


def cuda_forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    from ditfast import _C

    qkv = _aligned(qkv)
    out, lse = empty_outputs(qkv, num_heads, "cuda")
    pointers = _pointers(qkv=qkv, out=out, lse=lse)
    _C.attention_forward_cuda(**pointers, **_geometry(qkv, num_heads), scale=scale, **_launch_target(qkv))
    return out, lse


def cuda_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    from ditfast import _C

    qkv, dout = _aligned(qkv), _aligned(dout)
    dqkv = qkv.new_empty(*qkv.shape)
    sums = _dbias_buffer(qkv, _C.attention_backward_groups(qkv.shape[1]), bias_dtype)
    pointers = _pointers(dout=dout, qkv=qkv, out=out, lse=lse, dqkv=dqkv, **sums)
    strides = {"dout_stride_b": dout.stride(0), "dout_stride_n": dout.stride(1)}
    _C.attention_backward_cuda(
        **pointers, **_geometry(qkv, lse.shape[1]), **strides, scale=scale, **_launch_target(qkv)
    )
    return dqkv, sums["dbias"].sum(0).to(bias_dtype) if sums else None


def _aligned(t):
    """``t`` laid out as the CUDA kernels load it; copied only if necessary."""
    return t if t.stride(-1) == 1 and is_aligned(t) else t.clone(memory_format=torch.contiguous_format)


def is_aligned(t: Tensor) -> bool:
    """Whether every row of ``t`` (B, N, D) is aligned to 16 bytes, as the CUDA kernels require."""
    return all(x * t.element_size() % 16 == 0 for x in t.stride()[:2]) and t.data_ptr() % 16 == 0


def _dbias_buffer(qkv, rows, bias_dtype):
    """{"dbias": (B * rows, 3*H*d)} for partial sums of a bias's gradient; {} if ``bias_dtype`` is None."""
    b, _, width = qkv.shape
    return {"dbias": qkv.new_empty(b * rows, width, dtype=torch.float32)} if bias_dtype is not None else {}


def _pointers(**tensors):
    return {name: t.data_ptr() for name, t in tensors.items()}


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
    }


def _launch_target(t):
    return {"device": t.device.index, "stream": torch.cuda.current_stream(t.device).cuda_stream}
