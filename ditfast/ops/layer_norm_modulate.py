"""layer_norm_modulate: h = LayerNorm(x) * (1 + scale) + shift, the adaLN of the paper's section 3.2."""

import torch

from ditfast.ops import checks, explicit, reference
from ditfast.ops.backend import note, resolve
from ditfast.ops.registration import define, differentiable, reject_double_backward, run
from ditfast.ops.rows import choose, linear_dtype


def layer_norm_modulate(x, shift, scale, eps: float = 1e-6, *, backend=None):
    """LayerNorm without affine parameters over D, then the sample's scale and shift.

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
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2, "adaLN".
    """
    _check(x, shift, scale)
    name = choose(_OP, backend, x, None, None, shift, scale)
    dtype = linear_dtype(x)
    if name == "reference":
        note(_OP, name)
        return reference.layer_norm_modulate(x, shift, scale, eps, dtype)
    return _call(x, shift, scale, eps, dtype, name)[0]


_OP = "layer_norm_modulate"


def _check(x, shift, scale):
    checks.tokens("x", x)
    checks.modulation("shift", shift, x)
    checks.modulation("scale", scale, x)


def _forward(x, shift, scale, eps, out_dtype, backend):
    if resolve(_OP, backend, x, scale, x.shape[-1]) == "triton":
        from ditfast.kernels import layer_norm_modulate as kernel

        return kernel.forward(x, shift, scale, eps, out_dtype)
    return explicit.layer_norm_modulate(x, shift, scale, eps, out_dtype)


def _forward_fake(x, shift, scale, eps, out_dtype, backend):
    stats = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), stats, torch.empty_like(stats)


def _backward(dh, x, scale, mean, rstd, backend):
    if resolve(_OP, backend, x, scale, x.shape[-1]) == "triton":
        from ditfast.kernels import layer_norm_modulate as kernel

        return kernel.backward(dh, x, scale, mean, rstd)
    return explicit.layer_norm_modulate_backward(dh, x, scale, mean, rstd)


def _backward_fake(dh, x, scale, mean, rstd, backend):
    return x.new_empty(x.shape), scale.new_empty(2, *scale.shape)


_forward_op = define(
    "layer_norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "layer_norm_modulate_backward(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, _, scale, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _autograd_backward(ctx, dh, _dmean, _drstd):
    dx, (dshift, dscale) = run(_backward_op, dh, *ctx.saved_tensors, ctx.backend)
    return dx, dshift, dscale, None, None, None


reject_double_backward(_OP, _backward_op)
_call = differentiable(_OP, _forward_op, _setup_context, _autograd_backward)
