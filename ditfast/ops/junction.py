"""gated_residual_layer_norm_modulate: the junction between two branches of a block, in one pass."""

import torch
from torch import Tensor

from ditfast.ops import checks, fallback, host, reference
from ditfast.ops.autocast import linear_dtype
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.op import WITH_STREAM, Backend, Op, no_products
from ditfast.ops.registration import attach_autograd, register_op, reject_double_backward, run_in_backward
from ditfast.ops.rows import choose_for_rows, random_residual
from ditfast.ops.tangents import register_jvp


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    *,
    backend: Backend = None,
) -> tuple[Tensor, Tensor]:
    """End one branch and begin the next: ``x_new = x + gate * (y + bias)``, ``h = LN(x_new) * (1 + scale) + shift``.

    Args:
        x: (B, N, D) residual stream.
        y: (B, N, D) output of the ending branch.
        gate: (B, D) of the ending branch; shift, scale: (B, D) of the beginning one. Any stride between
            samples; (B, N, D), one row per token, runs on the reference.
        eps: added to the variance.
        bias: (D,) of the Linear that computed y and left its bias out.
        backend: see `ditfast.ops`.

    Returns:
        x_new: (B, N, D) in the dtype of x.
        h: (B, N, D) in the dtype of x; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block"; the fusion is our own.
    """
    _check(x, y, gate, shift, scale, bias)
    checks.epsilon(eps)
    name = choose_for_rows(OP, backend, x, y, bias, gate, shift, scale)
    dtype = linear_dtype(x)
    if name == "reference":
        note(OP.name, name)
        return reference.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps, bias, dtype)
    return _call(x, y, gate, shift, scale, eps, bias, dtype, name)[:2]


def _check(x, y, gate, shift, scale, bias):
    shape, device = checks.residual(x, y, gate, bias)
    checks.modulation("shift", shift, shape, device)
    checks.modulation("scale", scale, shape, device)


def _forward(x, y, gate, shift, scale, eps, bias, out_dtype, backend):
    name = resolve(OP, backend, x, scale, x.shape[-1])
    if name == "triton":
        from ditfast.kernels import junction as kernel

        return kernel.forward(x, y, gate, shift, scale, eps, bias, out_dtype)
    if name == "host":
        return host.junction(x, y, gate, shift, scale, eps, bias, out_dtype)
    return fallback.junction(x, y, gate, shift, scale, eps, bias, out_dtype)


def _forward_fake(x, y, gate, shift, scale, eps, bias, out_dtype, backend):
    stats = x.new_empty(x.shape[:2], dtype=fallback.wide(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _jvp(x, y, gate, shift, scale, eps, bias, out_dtype, x_t, y_t, gate_t, shift_t, scale_t, bias_t, backend):
    name = resolve(OP, backend, x, scale, x.shape[-1])
    args = x, y, gate, shift, scale, eps, bias, out_dtype, x_t, y_t, gate_t, shift_t, scale_t, bias_t
    if name == "triton":
        from ditfast.kernels import junction as kernel

        return kernel.jvp(*args)
    return host.junction_jvp(*args) if name == "host" else fallback.junction_jvp(*args)


def _backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, backend):
    name = resolve(OP, backend, x_new, scale, y.shape[-1])
    if name == "triton":
        from ditfast.kernels import junction as kernel

        return kernel.backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd)
    if name == "host":
        return host.junction_backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd)
    return fallback.junction_backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd)


def _backward_fake(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, backend):
    dbias = gate.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x_new.new_empty(x_new.shape), y.new_empty(y.shape), scale.new_empty(3, *scale.shape), dbias


_forward_op = register_op(
    "gated_residual_layer_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps,"
    " Tensor? bias, ScalarType out_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    {"x": "B,N,D", "y": "B,N,D", "gate": "B,D", "shift": "B,D", "scale": "B,D", "bias": "D"},
    sample_dims=(0, 0, 0, 0),
    shared=("bias",),
)
_backward_op = register_op(
    "gated_residual_layer_norm_modulate_backward(Tensor dx_new, Tensor dh, Tensor x_new, Tensor y, Tensor gate,"
    " Tensor scale, Tensor? bias, Tensor mean, Tensor rstd, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    {
        "dx_new": "B,N,D",
        "dh": "B,N,D",
        "x_new": "B,N,D dense",
        "y": "B,N,D",
        "gate": "B,D",
        "scale": "B,D",
        "bias": "D",
        "mean": "B,N dense wide:x_new",
        "rstd": "B,N dense wide:x_new",
    },
    sample_dims=(0, 0, 1, None),
    shared=("bias",),
)


def _setup_context(ctx, inputs, output):
    _, y, gate, _, scale, _, bias, _, ctx.backend = inputs
    x_new, _, mean, rstd = output
    ctx.save_for_backward(x_new, y, gate, scale, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd_backward(ctx, dx_new, dh, _dmean, _drstd):
    saved = ctx.saved_tensors  # read once: checkpointing unpacks each tensor a single time
    dx, dy, (dgate, dshift, dscale), dbias = run_in_backward(_backward_op, dx_new, dh, *saved, ctx.backend)
    bias = saved[4]
    return dx, dy, dgate, dshift, dscale, None, (None if bias is None else dbias), None, None


_NAME = "gated_residual_layer_norm_modulate"
reject_double_backward(_NAME, _backward_op)
_with_tangents = register_jvp(_forward_op, _jvp, _setup_context, _autograd_backward, outputs=2)
_call = attach_autograd(_NAME, _forward_op, _setup_context, _autograd_backward, _with_tangents)


def _arguments(t, batch, tokens, dim):
    return random_residual(t, batch, tokens, dim, "gate", "shift", "scale")


def _self_check(t, dim, backend):
    x, y, gate, shift, scale, bias = _arguments(t, *t.size, dim).values()
    dx_new, dh, result = t(*x.shape, stream=True), t(*x.shape), {}
    tangents = t(*x.shape, stream=True), *(t(*each.shape) for each in (y, gate, shift, scale)), t(dim, stream=True)
    *_, x_new_t, h_t = _jvp(x, y, gate, shift, scale, 1e-6, bias, t.branch, *tangents, backend)
    result |= {"x_new_t": x_new_t, "h_t": h_t}
    for b, remark in ((bias, ""), (None, " (no bias)")):
        x_new, h, mean, rstd = _forward(x, y, gate, shift, scale, 1e-6, b, t.branch, backend)
        dx, dy, modulation, dbias = _backward(dx_new, dh, x_new, y, gate, scale, b, mean, rstd, backend)
        names = [name + remark for name in ("x_new", "h", "dx", "dy", "dgate", "dshift", "dscale", "dbias")]
        result |= dict(zip(names, (x_new, h, dx, dy, *modulation, dbias), strict=True))
    return result


OP = Op(
    name=_NAME,
    function=gated_residual_layer_norm_modulate,
    backends={"triton": WITH_STREAM, "host": WITH_STREAM, "reference": WITH_STREAM},
    arguments=_arguments,
    outputs=("x_new", "h"),
    parameters=("bias",),
    self_check=_self_check,
    auto_precisions=WITH_STREAM,
    flops=dict.fromkeys((f"{_NAME}{kind}" for kind in ("", "_backward", "_jvp")), no_products),
    moved={"fwd": ("x", "y", "x_new", "h"), "bwd": ("dx_new", "dh", "x_new", "y", "dx", "dy")},
)
