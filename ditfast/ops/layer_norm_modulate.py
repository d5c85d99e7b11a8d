"""layer_norm_modulate: h = LayerNorm(x) * (1 + scale) + shift, the adaLN of the paper's section 3.2."""

import torch
from torch import Tensor

from ditfast.ops import checks, fallback, host, reference
from ditfast.ops.autocast import linear_dtype
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.op import WITH_STREAM, Backend, Op, no_products
from ditfast.ops.registration import attach_autograd, register_op, reject_double_backward, run_in_backward
from ditfast.ops.rows import choose_for_rows, random_modulation
from ditfast.ops.tangents import register_jvp


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: Backend = None
) -> Tensor:
    """Apply LayerNorm over D without affine parameters, then each sample's scale and shift.

    Args:
        x: (B, N, D) tokens.
        shift, scale: (B, D), any stride between samples (views into one (B, 6D) tensor are not copied), or
            (B, N, D), one row per token, which runs on the reference.
        eps: added to the variance.
        backend: see `ditfast.ops`.

    Returns:
        h: (B, N, D) in the dtype of x; under autocast in the autocast dtype, since a Linear reads it.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2, "adaLN".
    """
    _check(x, shift, scale)
    checks.epsilon(eps)
    name = choose_for_rows(OP, backend, x, None, None, shift, scale)
    dtype = linear_dtype(x)
    if name == "reference":
        note(OP.name, name)
        return reference.layer_norm_modulate(x, shift, scale, eps, dtype)
    return _call(x, shift, scale, eps, dtype, name)[0]


def _check(x, shift, scale):
    shape, device = checks.tokens("x", x), x.device
    checks.modulation("shift", shift, shape, device)
    checks.modulation("scale", scale, shape, device)


def _forward(x, shift, scale, eps, out_dtype, backend):
    name = resolve(OP, backend, x, scale, x.shape[-1])
    if name == "triton":
        from ditfast.kernels import layer_norm_modulate as kernel

        return kernel.forward(x, shift, scale, eps, out_dtype)
    if name == "host":
        return host.layer_norm_modulate(x, shift, scale, eps, out_dtype)
    return fallback.layer_norm_modulate(x, shift, scale, eps, out_dtype)


def _forward_fake(x, shift, scale, eps, out_dtype, backend):
    stats = x.new_empty(x.shape[:2], dtype=fallback.wide(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _jvp(x, shift, scale, eps, out_dtype, x_t, shift_t, scale_t, backend):
    name = resolve(OP, backend, x, scale, x.shape[-1])
    args = x, shift, scale, eps, out_dtype, x_t, shift_t, scale_t
    if name == "triton":
        from ditfast.kernels import layer_norm_modulate as kernel

        return kernel.jvp(*args)
    return host.layer_norm_modulate_jvp(*args) if name == "host" else fallback.layer_norm_modulate_jvp(*args)


def _backward(dh, x, scale, mean, rstd, backend):
    name = resolve(OP, backend, x, scale, x.shape[-1])
    if name == "triton":
        from ditfast.kernels import layer_norm_modulate as kernel

        return kernel.backward(dh, x, scale, mean, rstd)
    if name == "host":
        return host.layer_norm_modulate_backward(dh, x, scale, mean, rstd)
    return fallback.layer_norm_modulate_backward(dh, x, scale, mean, rstd)


def _backward_fake(dh, x, scale, mean, rstd, backend):
    return x.new_empty(x.shape), scale.new_empty(2, *scale.shape)


_forward_op = register_op(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    {"x": "B,N,D", "shift": "B,D", "scale": "B,D"},
    sample_dims=(0, 0, 0),
)
_backward_op = register_op(
    "layer_norm_modulate_backward(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    {"dh": "B,N,D", "x": "B,N,D", "scale": "B,D", "mean": "B,N dense wide:x", "rstd": "B,N dense wide:x"},
    sample_dims=(0, 1),
)


def _setup_context(ctx, inputs, output):
    x, _, scale, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd_backward(ctx, dh, _dmean, _drstd):
    dx, (dshift, dscale) = run_in_backward(_backward_op, dh, *ctx.saved_tensors, ctx.backend)
    return dx, dshift, dscale, None, None, None


reject_double_backward("layer_norm_modulate", _backward_op)
_with_tangents = register_jvp(_forward_op, _jvp, _setup_context, _autograd_backward, outputs=1)
_call = attach_autograd("layer_norm_modulate", _forward_op, _setup_context, _autograd_backward, _with_tangents)


def _arguments(t, batch, tokens, dim):
    rows = random_modulation(t, batch, dim, "shift", "scale")
    return {"x": t(batch, tokens, dim, stream=True, spread=3.0), **rows}


def _self_check(t, dim, backend):
    x, shift, scale = _arguments(t, *t.size, dim).values()
    h, mean, rstd = _forward(x, shift, scale, 1e-6, t.branch, backend)
    dx, (dshift, dscale) = _backward(t(*h.shape), x, scale, mean, rstd, backend)
    tangents = t(*x.shape, stream=True), t(*shift.shape), t(*scale.shape)
    h_t = _jvp(x, shift, scale, 1e-6, t.branch, *tangents, backend)[-1]
    return {"h": h, "dx": dx, "dshift": dshift, "dscale": dscale, "h_t": h_t}


OP = Op(
    name="layer_norm_modulate",
    function=layer_norm_modulate,
    backends={"triton": WITH_STREAM, "host": WITH_STREAM, "reference": WITH_STREAM},
    arguments=_arguments,
    outputs=("h",),
    self_check=_self_check,
    auto_precisions=WITH_STREAM,
    flops=dict.fromkeys((f"layer_norm_modulate{kind}" for kind in ("", "_backward", "_jvp")), no_products),
    moved={"fwd": ("x", "h"), "bwd": ("dh", "x", "dx")},
)
