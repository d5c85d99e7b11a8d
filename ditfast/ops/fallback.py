"""Explicit formulas of the fused operations, their gradients and tangents, for when a kernel cannot run after all.

A traced graph contains the operation itself, whose backend is decided at run time: if that is not a kernel, the
operation needs explicit gradients. Modulation is (B, D) here; arithmetic and statistics are float32, or float64 for
float64 tensors. Results are contiguous whatever the inputs' strides, like a kernel's: the graph relies on it.
"""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of tensors in ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(t):
    return t.to(wide(t.dtype))


def _result(t, dtype):
    return t.to(dtype).contiguous()


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, N, D), and mean and rstd of the rows of x (B, N)."""
    x = _wide(x)
    mean = x.mean(-1)  # (B, N)
    xc = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(xc.square().mean(-1) + eps)
    h = xc * rstd.unsqueeze(-1) * (1 + _wide(scale)).unsqueeze(1) + _wide(shift).unsqueeze(1)
    return _result(h, out_dtype), mean.contiguous(), rstd.contiguous()


def layer_norm_modulate_backward(
    dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `layer_norm_modulate`: dx (B, N, D) and (2, B, D): dshift, dscale."""
    dh, rstd = _wide(dh), rstd.unsqueeze(-1)
    xhat = (_wide(x) - mean.unsqueeze(-1)) * rstd  # (B, N, D)
    g = dh * (1 + _wide(scale)).unsqueeze(1)
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return _result(dx, x.dtype), _result(torch.stack((dh.sum(1), (dh * xhat).sum(1))), scale.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """x + gate * (y + bias), (B, N, D) in the dtype of x."""
    y = _wide(y) if bias is None else _wide(y) + _wide(bias)
    return _result(_wide(x) + _wide(gate).unsqueeze(1) * y, x.dtype)


def gated_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dgate, dbias of `gated_residual` (dx is dout itself); dbias is empty without a bias."""
    dout = _wide(dout)
    dy = dout * _wide(gate).unsqueeze(1)
    biased = _wide(y) if bias is None else _wide(y) + _wide(bias)
    dgate = _result((dout * biased).sum(1), gate.dtype)
    dbias = gate.new_empty(0) if bias is None else dy.sum((0, 1)).to(bias.dtype)
    return _result(dy, y.dtype), dgate, dbias


def junction(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new, h (B, N, D), and mean and rstd of the rows of x_new (B, N)."""
    x_new = gated_residual(x, y, gate, bias)
    return x_new, *layer_norm_modulate(x_new, shift, scale, eps, out_dtype)


def junction_backward(
    dx_new: Tensor,
    dh: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `junction`: dx, dy (B, N, D), (3, B, D): dgate, dshift, dscale, and dbias (D,) or empty."""
    dx, dmodulation = layer_norm_modulate_backward(dh, _wide(x_new), _wide(scale), mean, rstd)
    dx = _wide(dx_new) + dx
    dy, dgate, dbias = gated_residual_backward(dx, y, gate, bias)
    dmodulation = _result(torch.cat((_wide(dgate).unsqueeze(0), dmodulation)), scale.dtype)
    return _result(dx, x_new.dtype), dy, dmodulation, dbias


def attention(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, N, H*d), and the log-sum-exp of the logits, lse (B, H, N), in at least float32."""
    q, k, v = _heads(qkv, num_heads)
    logits = q @ k.mT * scale  # (B, H, N, N)
    lse = logits.logsumexp(-1)
    out = torch.exp(logits - lse.unsqueeze(-1)) @ v
    return _result(out.transpose(1, 2).flatten(2), qkv.dtype), lse.contiguous()


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `attention`: dqkv (B, N, 3*H*d), and its sum over B and N in ``bias_dtype`` if given."""
    num_heads = lse.shape[1]
    q, k, v = _heads(qkv, num_heads)
    dout, out = (_wide(t).unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (dout, out))  # (B, H, N, d)
    p = torch.exp(q @ k.mT * scale - lse.unsqueeze(-1))  # (B, H, N, N)
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    dqkv = torch.stack((ds @ k, ds.mT @ q, p.mT @ dout))  # (3, B, H, N, d)
    dqkv = _result(dqkv.permute(1, 3, 0, 2, 4).flatten(2), qkv.dtype)
    return dqkv, dqkv.sum((0, 1), dtype=bias_dtype) if bias_dtype else None


def layer_norm_modulate_jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    x_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, mean, rstd of `layer_norm_modulate`, and the tangent of h from the inputs' tangents (None for zero)."""
    h, mean, rstd = layer_norm_modulate(x, shift, scale, eps, out_dtype)
    xhat = (_wide(x) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)  # (B, N, D)
    h_t = torch.zeros_like(xhat)
    if x_t is not None:
        x_t = _wide(x_t)
        xhat_t = x_t - x_t.mean(-1, keepdim=True) - xhat * (xhat * x_t).mean(-1, keepdim=True)
        h_t += xhat_t * rstd.unsqueeze(-1) * (1 + _wide(scale)).unsqueeze(1)
    if scale_t is not None:
        h_t += xhat * scale_t.unsqueeze(1)
    if shift_t is not None:
        h_t += shift_t.unsqueeze(1)
    return h, mean, rstd, _result(h_t, out_dtype)


def gated_residual_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    x_t: Tensor | None,
    y_t: Tensor | None,
    gate_t: Tensor | None,
    bias_t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and its tangent, (B, N, D) each."""
    biased = _wide(y) if bias is None else _wide(y) + _wide(bias)
    branch_t = torch.zeros_like(biased)
    for t in (y_t, bias_t):
        if t is not None:
            branch_t += t
    x_new_t = _wide(gate).unsqueeze(1) * branch_t
    if gate_t is not None:
        x_new_t += gate_t.unsqueeze(1) * biased
    if x_t is not None:
        x_new_t += x_t
    return gated_residual(x, y, gate, bias), _result(x_new_t, x.dtype)


def junction_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    x_t: Tensor | None,
    y_t: Tensor | None,
    gate_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
    bias_t: Tensor | None,
) -> tuple[Tensor, ...]:
    """x_new, h, mean, rstd of `junction`, and the tangents of x_new and h."""
    x_new, x_new_t = gated_residual_jvp(x, y, gate, bias, x_t, y_t, gate_t, bias_t)
    *outputs, h_t = layer_norm_modulate_jvp(x_new, shift, scale, eps, out_dtype, x_new_t, shift_t, scale_t)
    return x_new, *outputs, x_new_t, h_t


def attention_jvp(qkv: Tensor, qkv_t: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse of `attention`, and the tangent of out."""
    (q, k, v), (q_t, k_t, v_t) = _heads(qkv, num_heads), _heads(qkv_t, num_heads)
    p = (q @ k.mT * scale).softmax(-1)  # (B, H, N, N)
    logits_t = (q_t @ k.mT + q @ k_t.mT) * scale
    p_t = p * (logits_t - (p * logits_t).sum(-1, keepdim=True))
    out_t = p_t @ v + p @ v_t  # (B, H, N, d)
    return *attention(qkv, num_heads, scale), _result(out_t.transpose(1, 2).flatten(2), qkv.dtype)


def _heads(qkv, num_heads):
    """q, k, v, each (B, H, N, d)."""
    return _wide(qkv).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
