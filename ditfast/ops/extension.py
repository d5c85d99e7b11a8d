"""Calls into the C++ extension, which knows pointers and strides but no tensors."""

import torch


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """``t`` with unit stride in its last dimension; a copy only where it has another."""
    return t if t.stride(-1) == 1 else t.contiguous()


def empty_outputs(qkv: torch.Tensor, num_heads: int):
    """out (B, N, H*d) and lse (B, H, N) float32, not filled."""
    b, n, width = qkv.shape
    return qkv.new_empty(b, n, width // 3), qkv.new_empty(b, num_heads, n, dtype=torch.float32)


def host_forward(qkv, num_heads, scale):
    from ditfast import _C

    qkv = unit_stride(qkv)
    out, lse = empty_outputs(qkv, num_heads)
    pointers = _pointers(qkv=qkv, out=out, lse=lse)
    _C.attention_forward_host(**pointers, **_geometry(qkv, num_heads), scale=scale, threads=torch.get_num_threads())
    return out, lse


def host_backward(dout, qkv, out, lse, scale):
    from ditfast import _C

    qkv = unit_stride(qkv)
    dqkv = qkv.new_empty(qkv.shape)
    strides = dict(zip(("dout_stride_b", "dout_stride_n", "dout_stride_c"), dout.stride(), strict=True))
    pointers = _pointers(dout=dout, qkv=qkv, out=out, lse=lse, dqkv=dqkv)
    geometry = _geometry(qkv, lse.shape[1])
    _C.attention_backward_host(**pointers, **geometry, **strides, scale=scale, threads=torch.get_num_threads())
    return dqkv


def cuda_forward(qkv, num_heads, scale):
    from ditfast import _C

    qkv = unit_stride(qkv)
    out, lse = empty_outputs(qkv, num_heads)
    pointers = _pointers(qkv=qkv, out=out, lse=lse)
    _C.attention_forward_cuda(**pointers, **_geometry(qkv, num_heads), scale=scale, **_where(qkv))
    return out, lse


def cuda_backward(dout, qkv, out, lse, scale):
    from ditfast import _C

    qkv = unit_stride(qkv)
    dout = dout if dout.stride(-1) == 1 and is_aligned(dout) else dout.clone(memory_format=torch.contiguous_format)
    dqkv = qkv.new_empty(qkv.shape)
    pointers = _pointers(dout=dout, qkv=qkv, out=out, lse=lse, dqkv=dqkv)
    strides = {"dout_stride_b": dout.stride(0), "dout_stride_n": dout.stride(1)}
    _C.attention_backward_cuda(**pointers, **_geometry(qkv, lse.shape[1]), **strides, scale=scale, **_where(qkv))
    return dqkv


def is_aligned(t: torch.Tensor) -> bool:
    """Whether every row of ``t`` (B, N, D) begins at a multiple of 16 bytes, as the CUDA kernels load them."""
    return all(x * t.element_size() % 16 == 0 for x in t.stride()[:2]) and t.data_ptr() % 16 == 0


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


def _where(t):
    return {"device": t.device.index, "stream": torch.cuda.current_stream(t.device).cuda_stream}
