"""mlp: Linear, GELU (tanh), Linear in one autograd node."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ditfast.ops import checks, gemm, host, reference
from ditfast.ops.autocast import autocasts, cast_for_inference, linear_dtype
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import device_type, why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.bypass import is_transformed
from ditfast.ops.op import WITHOUT_STREAM, Backend, Op
from ditfast.ops.registration import (
    attach_autograd,
    call_below_autograd,
    is_tracked,
    register_op,
    reject_double_backward,
    run_in_backward,
)
from ditfast.ops.tangents import linear_tangent, register_jvp


def mlp(
    h: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor | None = None,
    recompute: bool = False,
    *,
    backend: Backend = None,
) -> Tensor:
    """Compute ``gelu(h @ w1.T + b1) @ w2.T + b2`` with tanh GELU.

    The GEMMs are the library's, or in float32 on some CPUs `ditfast.ops.gemm`'s. One backward pass computes the
    gradient before GELU, b1's gradient and, if it was not saved, the activation.

    Args:
        h: (B, N, D) tokens.
        w1: (F, D), b1: (F,) of the first Linear; F is the MLP's width.
        w2: (D_out, F), b2: (D_out,) or None of the second.
        recompute: save only the tensor before GELU and recompute the activation in backward.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D_out) in the dtype of h; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "pointwise feedforward"; Hendrycks & Gimpel, "Gaussian Error Linear Units".
    """
    _check(h, w1, b1, w2, b2)
    dtype, name = linear_dtype(h), choose_mlp(h, w1, b1, w2, b2, backend)
    if name == "reference":
        note(OP.name, name)
        # a checkpoint cannot know what tangents save, and function transforms refuse it
        if not recompute or forward_ad._current_level >= 0 or is_transformed():
            return reference.mlp(h, w1, b1, w2, b2)
        pre = F.linear(h, w1, b1)  # (B, N, F)
        if autocasts(h):  # once, not in forward and again in backward
            w2, b2 = w2.to(dtype), None if b2 is None else b2.to(dtype)
        return checkpoint(_second_half, pre, w2, b2, use_reentrant=False, preserve_rng_state=False)
    is_training = is_tracked((h, w1, b1, w2, b2))
    # cast here, as autocast would, so that autograd sees it
    cast = Tensor.to if is_training else cast_for_inference
    h, w1, b1, w2 = h.to(dtype), cast(w1, dtype), cast(b1, dtype), cast(w2, dtype)
    b2 = None if b2 is None else cast(b2, dtype)
    if is_training:
        return _call(h, w1, b1, w2, b2, recompute, name)[0]
    return call_below_autograd(_inference_op, h, w1, b1, w2, b2, name)


def choose_mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, requested: Backend) -> str:
    """`choose` for tokens of the shape and dtype of h."""
    dtype = linear_dtype(h)

    def takes_host(is_able):
        width = w1.shape[0]
        return on_cpu.takes_host(OP, dtype, dtype, width, h.shape[0] * h.shape[1] * width, is_able)

    return choose(OP, requested, device_type(h), lambda name: _unsupported(h, w1, b1, w2, b2), takes_host)


def _check(h, w1, b1, w2, b2):
    d, device = checks.tokens("h", h)[2], h.device
    width = checks.weight("w1", w1, "(F, D)", d, device)
    checks.tensor("b1", b1, "(F,)", (width,), device)
    d_out = checks.weight("w2", w2, "(D_out, F)", width, device)
    if b2 is not None:
        checks.tensor("b2", b2, "(D_out,)", (d_out,), device)
    checks.parameter_dtypes("h", h, w1=w1, b1=b1, w2=w2, b2=b2)


def _second_half(pre, w2, b2):
    return F.linear(F.gelu(pre, approximate="tanh"), w2, b2)


def _unsupported(h, *weights):
    return why_not_dtype(h, *weights)


def _inference(h, w1, b1, w2, b2, backend):
    name = resolve(OP, backend, h, h, w1.shape[0])
    rows, linear = h.reshape(-1, h.shape[-1]), gemm.linear_on_packed if name == "host" else F.linear
    if h.is_cuda:  # GELU in the GEMM's epilogue; on the CPU this function computes erf GELU
        act = torch._addmm_activation(b1, rows, w1.t(), use_gelu=True)
    else:
        act = gemm.linear_gelu(rows, w1, b1) if name == "host" else F.gelu(F.linear(rows, w1, b1), approximate="tanh")
    return linear(act, w2, b2).view(*h.shape[:2], w2.shape[0])


def _inference_fake(h, w1, b1, w2, b2, backend):
    return h.new_empty(*h.shape[:2], w2.shape[0])


def _forward(h, w1, b1, w2, b2, recompute, backend):
    name = resolve(OP, backend, h, h, w1.shape[0])
    rows, linear = h.reshape(-1, h.shape[-1]), gemm.linear if name == "host" else F.linear
    if name == "host":
        pre, act = gemm.linear_and_gelu(rows, w1, b1)  # (B*N, F) each
    else:
        pre = F.linear(rows, w1, b1)
        act = F.gelu(pre, approximate="tanh")
    y = linear(act, w2, b2).view(*h.shape[:2], w2.shape[0])
    return y, pre, pre.new_empty(0) if recompute else act


def _forward_fake(h, w1, b1, w2, b2, recompute, backend):
    pre = h.new_empty(h.shape[0] * h.shape[1], w1.shape[0])
    return _inference_fake(h, w1, b1, w2, b2, backend), pre, pre.new_empty(0) if recompute else torch.empty_like(pre)


def _jvp(h, w1, b1, w2, b2, recompute, h_t, w1_t, b1_t, w2_t, b2_t, backend):
    name = resolve(OP, backend, h, h, w1.shape[0])
    linear = gemm.linear if name == "host" else F.linear
    rows = h.reshape(-1, h.shape[-1])  # (B*N, D)
    pre = linear(rows, w1, b1)  # (B*N, F)
    pre_t = linear_tangent(rows, w1, None if h_t is None else h_t.reshape(rows.shape), w1_t, b1_t, linear)
    act, act_t = _gelu_jvp(pre, pre_t, name)
    y, y_t = linear(act, w2, b2), linear_tangent(act, w2, act_t, w2_t, b2_t, linear)
    y, y_t = (t.reshape(*h.shape[:2], w2.shape[0]) for t in (y, y_t))
    return y, pre, pre.new_empty(0) if recompute else act, y_t


def _backward(dy, h, w1, w2, pre, act, needs, backend):
    dy, rows = dy.reshape(-1, w2.shape[0]), h.reshape(-1, h.shape[-1])
    recompute = act.dim() == 1  # an empty vector stands for what was not saved
    name = resolve(OP, backend, h, h, w1.shape[0])
    matmul = gemm.matmul if name == "host" else torch.matmul
    dact = matmul(dy, w2)  # (B*N, F)
    dpre, db1, recomputed = gelu_backward(dact, pre, recompute, name)
    dh = matmul(dpre, w1).view_as(h) if needs[0] else dy.new_empty(0)
    dw1 = matmul(dpre.t(), rows) if needs[1] else dy.new_empty(0)
    del dact, dpre  # before dw2 takes as much
    dw2 = matmul(dy.t(), recomputed if recompute else act) if needs[3] else dy.new_empty(0)
    return dh, dw1, db1, dw2, dy.sum(0) if needs[4] else dy.new_empty(0)


def _gelu_jvp(pre, pre_t, backend):
    """GELU of pre (M, F) and its tangent; None for zero."""
    if pre_t is not None and backend == "triton":
        from ditfast.kernels import gelu

        return gelu.jvp(pre, pre_t)
    if pre_t is not None and backend == "host":
        return host.gelu_jvp(pre, pre_t)
    act = F.gelu(pre, approximate="tanh")
    # GELU's derivative times a gradient or a tangent: the same formula
    return act, None if pre_t is None else torch.ops.aten.gelu_backward(pre_t, pre, approximate="tanh")


def gelu_backward(dact: Tensor, pre: Tensor, recompute: bool, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """dpre (M, F), its sum over rows (F,), and GELU's output (M, F) if recomputed; kernels write dpre over dact."""
    if backend == "triton":
        from ditfast.kernels import gelu

        act, db1 = gelu.backward_(dact, pre, recompute, pre.dtype)
        return dact, db1, act
    if backend == "host":
        act, db1 = host.gelu_backward_(dact, pre, recompute)
        return dact, db1, act
    dpre = torch.ops.aten.gelu_backward(dact, pre, approximate="tanh")
    return dpre, dpre.sum(0), F.gelu(pre, approximate="tanh") if recompute else None


def _backward_fake(dy, h, w1, w2, pre, act, needs, backend):
    shapes = (h.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    wanted = (needs[0], needs[1], True, needs[3], needs[4])
    return tuple(dy.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


_RULES = {"h": "B,N,D", "w1": "F,D h", "b1": "F h", "w2": "O,F h", "b2": "O h"}
_inference_op = register_op(
    "mlp_inference(Tensor h, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, str backend) -> Tensor",
    _inference,
    _inference_fake,
    _RULES,
)
_forward_op = register_op(
    "mlp(Tensor h, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, bool recompute, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _RULES,
)
_backward_op = register_op(
    "mlp_backward(Tensor dy, Tensor h, Tensor w1, Tensor w2, Tensor pre, Tensor act, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    {name: _RULES[name] for name in ("h", "w1", "w2")}
    | {"dy": "B,N,O h", "pre": "BN,F dense h", "act": "BN,F unsaved h"},
)


def _setup_context(ctx, inputs, output):
    h, w1, _, w2, _, _, ctx.backend = inputs
    _, pre, act = output
    ctx.save_for_backward(h, w1, w2, pre, act)
    ctx.mark_non_differentiable(pre, act)
    ctx.set_materialize_grads(False)  # pre and act have none: do not allocate zeros for them


def _autograd_backward(ctx, dy, _dpre, _dact):
    needs = list(ctx.needs_input_grad[:5])
    grads = run_in_backward(_backward_op, dy, *ctx.saved_tensors, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


reject_double_backward("mlp", _backward_op)
_with_tangents = register_jvp(_forward_op, _jvp, _setup_context, _autograd_backward, outputs=1)
_call = attach_autograd("mlp", _forward_op, _setup_context, _autograd_backward, _with_tangents)


def _arguments(t, batch, tokens, dim, width=None):
    width = width or 4 * dim
    return {
        "h": t(batch, tokens, dim, spread=3.0),
        "w1": t(width, dim, spread=dim**-0.5),
        "b1": t(width, spread=0.5),
        "w2": t(dim, width, spread=width**-0.5),
        "b2": t(dim, spread=0.5),
    }


def _self_check(t, width, backend):
    h, w1, b1, w2, b2 = _arguments(t, *t.size, 128, width).values()
    dy, result = t(*h.shape), {}
    tangents = _arguments(t, *t.size, 128, width).values()
    result["y_t"] = _jvp(h, w1, b1, w2, b2, True, *tangents, backend)[-1]
    if h.is_cpu:
        with gemm.packed((w1, w2)):
            result["y (inference)"] = _inference(h, w1, b1, w2, b2, backend)
    for recompute, remark in ((False, ""), (True, " (recomputed)")):
        y, pre, act = _forward(h, w1, b1, w2, b2, recompute, backend)
        gradients = _backward(dy, h, w1, w2, pre, act, [True] * 5, backend)
        names = [name + remark for name in ("y", "dh", "dw1", "db1", "dw2", "db2")]
        result |= dict(zip(names, (y, *gradients), strict=True))
    return result


def _flops(h, w1, b1, w2, *_, **__):
    return 2 * prod(h[:-1]) * (prod(w1) + prod(w2))


def _backward_flops(dy, h, w1, w2, pre, act, needs, *_, **__):
    return 2 * prod(h[:-1]) * (prod(w2) * (1 + needs[3]) + prod(w1) * (needs[0] + needs[1]))


def _jvp_flops(h, w1, b1, w2, b2, recompute, h_t, w1_t, b1_t, w2_t, *_, **__):
    first = 1 + (h_t is not None) + (w1_t is not None)
    second = 1 + any(t is not None for t in (h_t, w1_t, b1_t)) + (w2_t is not None)
    return 2 * prod(h[:-1]) * (prod(w1) * first + prod(w2) * second)


OP = Op(
    name="mlp",
    function=mlp,
    backends={"triton": WITHOUT_STREAM, "host": WITHOUT_STREAM, "reference": WITHOUT_STREAM},
    arguments=_arguments,
    outputs=("y",),
    parameters=("w1", "b1", "w2", "b2"),
    self_check=_self_check,
    auto_precisions=WITHOUT_STREAM,
    widths=lambda hidden_size: (4 * hidden_size,),
    flops={"mlp": _flops, "mlp_inference": _flops, "mlp_backward": _backward_flops, "mlp_jvp": _jvp_flops},
    moved={"bwd": ("dact", "pre", "dpre"), "bwd, recompute": ("dact", "pre", "dpre", "act")},  # each (B, N, F)
)
