"""gated_residual_layer_norm_modulate: the junction between two branches of a block, in one pass."""

import torch

from ditfast.ops import checks, explicit, reference
from ditfast.ops.backend import note, resolve
from ditfast.ops.registration import define, differentiable, reject_double_backward, run
from ditfast.ops.rows import choose, linear_dtype


def gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps: float = 1e-6, bias=None, *, backend=None):
    """End one branch and begin the next: ``x_new = x + gate * (y + bias)``, ``h = LN(x_new) * (1 + scale) + shift``.

    Args:
        x: (B, N, D) residual stream.
        y: (B, N, D) output of the branch that ends.
        gate: (B, D) of the branch that ends; shift, scale: (B, D) of the one that begins. Any stride between
            samples; (B, N, D), one row per token, runs on the reference.
        eps: added to the variance.
        bias: (D,) of the Linear that made y, which then runs without it.
        backend: see `ditfast.ops`.

    Returns:
        x_new: (B, N, D) in the dtype of x.
        h: (B, N, D) in the dtype of x; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block"; the fusion is this package's.
    """
    _check(x, y, gate, shift, scale, bias)
    name = choose(_OP, backend, x, y, bias, gate, shift, scale)
    dtype = linear_dtype(x)
    if name == "reference":
        note(_OP, name)
        return reference.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps, bias, dtype)
    return _call(x, y, gate, shift, scale, eps, bias, dtype, name)[:2]


_OP = "gated_residual_layer_norm_modulate"


def _check(x, y, gate, shift, scale, bias):
    checks.residual(x, y, gate, bias)
    checks.modulation("shift", shift, x)
    checks.modulation("scale", scale, x)


def _forward(x, y, gate, shift, scale, eps, bias, out_dtype, backend):
    if resolve(_OP, backend, x, scale, x.shape[-1]) == "triton":
        from ditfast.kernels import junction as kernel

        return kernel.forward(x, y, gate, shift, scale, eps, bias, out_dtype)
    return explicit.junction(x, y, gate, shift, scale, eps, bias, out_dtype)


def _forward_fake(x, y, gate, shift, scale, eps, bias, out_dtype, backend):
    stats = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, backend):
    if resolve(_OP, backend, x_new, scale, y.shape[-1]) == "triton":
        from ditfast.kernels import junction as kernel

        return kernel.backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd)
    return explicit.junction_backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd)


def _backward_fake(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, backend):
    dbias = gate.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x_new.new_empty(x_new.shape), y.new_empty(y.shape), scale.new_empty(3, *scale.shape), dbias


_forward_op = define(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps,"
    " Tensor? bias, ScalarType out_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "gated_residual_layer_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor gate,"
    " Tensor scale, Tensor? bias, Tensor mean, Tensor rstd, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    _, y, gate, _, scale, _, bias, _, ctx.backend = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x_new, y, gate, scale, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd_backward(ctx, dx_new, dh, _dmean, _drstd):
    saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
    dx, dy, (dgate, dshift, dscale), dbias = run(_backward_op, dx_new, dh, *saved, ctx.backend)
    bias = saved[4]
    return dx, dy, dgate, dshift, dscale, None, (None if bias is None else dbias), None, None


reject_double_backward(_OP, _backward_op)
_call = differentiable(_OP, _forward_op, _setup_context, _autograd_backward)
