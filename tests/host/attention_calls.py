"""Calls of the extension's attention on the CPU, and how close to float64 it must be."""

import math

import pytest
import torch
from attention_cases import NAN, reference

from ditfast.ops.contract import verdict

_C = pytest.importorskip("ditfast._C")


def geometry(qkv, heads, scale=None, threads=2):
    b, n, width = qkv.shape
    d = width // (3 * heads)
    return {
        "dtype": str(qkv.dtype).removeprefix("torch."),
        "batch": b,
        "tokens": n,
        "heads": heads,
        "head_dim": d,
        "stride_b": qkv.stride(0),
        "stride_n": qkv.stride(1),
        "scale": d**-0.5 if scale is None else scale,
        "threads": threads,
    }


def forward(qkv, heads, **options):
    """out and lse, in two parts, filled with NaN before the call."""
    b, n, width = qkv.shape
    out = torch.full((b, n, width // 3), NAN, dtype=qkv.dtype)
    lse = torch.full((b, 2 * heads, n), NAN)
    pointers = {"qkv": qkv.data_ptr(), "out": out.data_ptr(), "lse": lse.data_ptr()}
    _C.attention_forward_host(**pointers, **geometry(qkv, heads, **options))
    return out, lse


def whole(lse, dtype):
    """lse (B, H, N) in float64 from its two parts (B, 2*H, N), of which the first has another unit in 16 bits."""
    largest, inverse = lse.double().chunk(2, dim=1)
    return largest * (1.0 if dtype == torch.float32 else math.log(2)) - inverse.log()


def backward(dout, qkv, out, lse, heads, **options):
    dqkv = torch.full(qkv.shape, NAN, dtype=qkv.dtype)
    tensors = {"dout": dout, "qkv": qkv, "out": out, "lse": lse, "dqkv": dqkv}
    strides = dict(zip(["dout_stride_b", "dout_stride_n", "dout_stride_c"], dout.stride(), strict=True))
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    _C.attention_backward_host(**pointers, **strides, **geometry(qkv, heads, **options))
    return dqkv


def run(qkv, dout, heads, **options):
    out, lse = forward(qkv, heads, **options)
    return out, lse, backward(dout, qkv, out, lse, heads, **options)


def assert_right(qkv, dout, heads, scale=None):
    """out, lse and dqkv meet the contract, for lse a rule of its own.

    One more ulp of float32 is allowed: by luck, plain PyTorch is sometimes that close to float64.
    """
    out, lse, dqkv = run(qkv, dout, heads, scale=scale)
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
    exact_out, exact_lse, exact_dqkv, _ = reference(qkv, dout, heads, torch.float64, scale)
    low_out, _, low_dqkv, _ = reference(qkv, dout, heads, qkv.dtype, scale)
    torch.testing.assert_close(whole(lse, qkv.dtype), exact_lse, atol=1e-5, rtol=2e-6)
    triples = zip(*(t.chunk(3, dim=-1) for t in (dqkv, low_dqkv, exact_dqkv)), strict=True)
    for name, tensors in zip(("out", "dq", "dk", "dv"), ((out, low_out, exact_out), *triples), strict=True):
        reason = verdict(name, *tensors, slack=torch.finfo(torch.float32).eps)["reason"]
        assert reason is None, reason
