"""gated_residual: x + gate * (y + bias), the residual connection of adaLN-Zero."""

from torch import Tensor

from ditfast.ops import checks, fallback, host, reference
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.op import WITH_STREAM, Backend, Op, no_products
from ditfast.ops.registration import attach_autograd, register_op, reject_double_backward, run_in_backward
from ditfast.ops.rows import choose_for_rows, random_residual
from ditfast.ops.tangents import register_jvp


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None = None, *, backend: Backend = None
) -> Tensor:
    """Add a branch to the residual stream, scaled by each sample's gate.

    Args:
        x: (B, N, D) residual stream.
        y: (B, N, D) output of the branch.
        gate: (B, D), any stride between samples, or (B, N, D), one row per token, which runs on the reference.
        bias: (D,) of the Linear that computed y and left its bias out; its gradient then costs no extra pass.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D) in the dtype of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block".
    """
    checks.residual(x, y, gate, bias)
    name = choose_for_rows(OP, backend, x, y, bias, gate)
    if name == "reference":
        note(OP.name, name)
        return reference.gated_residual(x, y, gate, bias)
    return _call(x, y, gate, bias, name)


def _forward(x, y, gate, bias, backend):
    name = resolve(OP, backend, x, gate, x.shape[-1])
    if name == "triton":
        from ditfast.kernels import gated_residual as kernel

        return kernel.forward(x, y, gate, bias)
    if name == "host":
        return host.gated_residual(x, y, gate, bias)
    return fallback.gated_residual(x, y, gate, bias)


def _forward_fake(x, y, gate, bias, backend):
    return x.new_empty(x.shape)


def _jvp(x, y, gate, bias, x_t, y_t, gate_t, bias_t, backend):
    name = resolve(OP, backend, x, gate, x.shape[-1])
    args = x, y, gate, bias, x_t, y_t, gate_t, bias_t
    if name == "triton":
        from ditfast.kernels import gated_residual as kernel

        return kernel.jvp(*args)
    return host.gated_residual_jvp(*args) if name == "host" else fallback.gated_residual_jvp(*args)


def _backward(dout, y, gate, bias, backend):
    name = resolve(OP, backend, dout, gate, y.shape[-1])
    if name == "triton":
        from ditfast.kernels import gated_residual as kernel

        return kernel.backward(dout, y, gate, bias)
    if name == "host":
        return host.gated_residual_backward(dout, y, gate, bias)
    return fallback.gated_residual_backward(dout, y, gate, bias)


def _backward_fake(dout, y, gate, bias, backend):
    dbias = gate.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return y.new_empty(y.shape), gate.new_empty(gate.shape), dbias


_forward_op = register_op(
    "gated_residual(Tensor x, Tensor y, Tensor gate, Tensor? bias, str backend) -> Tensor",
    _forward,
    _forward_fake,
    {"x": "B,N,D", "y": "B,N,D", "gate": "B,D", "bias": "D"},
    sample_dims=(0,),
    shared=("bias",),
)
_backward_op = register_op(
    "gated_residual_backward(Tensor dout, Tensor y, Tensor gate, Tensor? bias, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    {"dout": "B,N,D", "y": "B,N,D", "gate": "B,D", "bias": "D"},
    sample_dims=(0, 0, None),
    shared=("bias",),
)


def _setup_context(ctx, inputs, output):
    _, y, gate, bias, ctx.backend = inputs
    ctx.save_for_backward(y, gate, bias)


def _autograd_backward(ctx, dout):
    y, gate, bias = ctx.saved_tensors
    dy, dgate, dbias = run_in_backward(_backward_op, dout, y, gate, bias, ctx.backend)
    return dout, dy, dgate, (None if bias is None else dbias), None


reject_double_backward("gated_residual", _backward_op)
_with_tangents = register_jvp(_forward_op, _jvp, _setup_context, _autograd_backward, outputs=1)
_call = attach_autograd("gated_residual", _forward_op, _setup_context, _autograd_backward, _with_tangents)


def _arguments(t, batch, tokens, dim):
    return random_residual(t, batch, tokens, dim, "gate")


def _self_check(t, dim, backend):
    x, y, gate, bias = _arguments(t, *t.size, dim).values()
    dx_new, result = t(*x.shape, stream=True), {}
    tangents = t(*x.shape, stream=True), t(*y.shape), t(*gate.shape), t(*bias.shape, stream=True)
    result["x_new_t"] = _jvp(x, y, gate, bias, *tangents, backend)[-1]
    for b, remark in ((bias, ""), (None, " (no bias)")):
        gradients = _backward(dx_new, y, gate, b, backend)
        names = [name + remark for name in ("x_new", "dy", "dgate", "dbias")]
        result |= dict(zip(names, (_forward(x, y, gate, b, backend), *gradients), strict=True))
    return result


OP = Op(
    name="gated_residual",
    function=gated_residual,
    backends={"triton": WITH_STREAM, "host": WITH_STREAM, "reference": WITH_STREAM},
    arguments=_arguments,
    outputs=("x_new",),
    parameters=("bias",),
    self_check=_self_check,
    auto_precisions=WITH_STREAM,
    flops=dict.fromkeys((f"gated_residual{kind}" for kind in ("", "_backward", "_jvp")), no_products),
    moved={"fwd": ("x", "y", "x_new"), "bwd": ("dx_new", "y", "dy")},  # dx is dx_new as it is
)
