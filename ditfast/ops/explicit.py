"""Forward and backward of the fused operations written out, for where a kernel was expected and cannot run.

A traced graph holds the operation itself, whose backend is decided when it runs: if that is not a kernel, the
operation needs its gradients as formulas. Modulation is (B, D) here; arithmetic and statistics are float32.
"""

import torch


def layer_norm_modulate(x, shift, scale, eps, out_dtype):
    """h (B, N, D), and mean and rstd of the rows of x (B, N)."""
    x = x.float()
    mean = x.mean(-1)  # (B, N)
    xc = x - mean.unsqueeze(-1)
    rstd = torch.rsqrt(xc.square().mean(-1) + eps)
    h = xc * rstd.unsqueeze(-1) * (1 + scale.float()).unsqueeze(1) + shift.float().unsqueeze(1)
    return h.to(out_dtype), mean, rstd


def layer_norm_modulate_backward(dh, x, scale, mean, rstd):
    """Gradients of `layer_norm_modulate`: dx (B, N, D) and (2, B, D): dshift, dscale."""
    dh, rstd = dh.float(), rstd.unsqueeze(-1)
    xhat = (x.float() - mean.unsqueeze(-1)) * rstd  # (B, N, D)
    g = dh * (1 + scale.float()).unsqueeze(1)
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), torch.stack((dh.sum(1), (dh * xhat).sum(1))).to(scale.dtype)


def gated_residual(x, y, gate, bias):
    """x + gate * (y + bias), (B, N, D) in the dtype of x."""
    y = y.float() if bias is None else y.float() + bias.float()
    return (x.float() + gate.float().unsqueeze(1) * y).to(x.dtype)


def gated_residual_backward(dout, y, gate, bias):
    """dy, dgate, dbias of `gated_residual` (dx is dout itself); dbias is empty without a bias."""
    dout = dout.float()
    dy = dout * gate.float().unsqueeze(1)
    biased = y.float() if bias is None else y.float() + bias.float()
    dgate = (dout * biased).sum(1).to(gate.dtype)
    dbias = gate.new_empty(0) if bias is None else dy.sum((0, 1)).to(bias.dtype)
    return dy.to(y.dtype), dgate, dbias


def junction(x, y, gate, shift, scale, eps, bias, out_dtype):
    """x_new, h (B, N, D), and mean and rstd of the rows of x_new (B, N)."""
    x_new = gated_residual(x, y, gate, bias)
    return x_new, *layer_norm_modulate(x_new, shift, scale, eps, out_dtype)


def junction_backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd):
    """Gradients of `junction`: dx, dy (B, N, D), (3, B, D): dgate, dshift, dscale, and dbias (D,) or empty."""
    dx, dmodulation = layer_norm_modulate_backward(dh, x_new.float(), scale.float(), mean, rstd)
    dx = dx_new.float() + dx
    dy, dgate, dbias = gated_residual_backward(dx, y, gate, bias)
    dmodulation = torch.cat((dgate.float().unsqueeze(0), dmodulation)).to(scale.dtype)
    return dx.to(x_new.dtype), dy, dmodulation, dbias
