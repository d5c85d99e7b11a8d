"""mlp: Linear, GELU (tanh), Linear in one autograd node."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ditfast.ops import checks, reference
from ditfast.ops.backend import DTYPES, choose, note, resolve
from ditfast.ops.registration import define, differentiable, is_tracked, reject_double_backward, run
from ditfast.ops.rows import autocasts, linear_dtype


def mlp(h, w1, b1, w2, b2=None, recompute: bool = False, *, backend=None):
    """``gelu(h @ w1.T + b1) @ w2.T + b2`` with the tanh form of GELU.

    The GEMMs are the library's. One pass of backward gives the gradient before GELU and b1's gradient, and the
    activation again if it was not kept.

    Args:
        h: (B, N, D) tokens.
        w1: (F, D), b1: (F,) of the first Linear; F is the MLP's width.
        w2: (D_out, F), b2: (D_out,) or None of the second.
        recompute: keep only the tensor before GELU for backward, and compute the activation again there.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D_out) in the dtype of h; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "pointwise feedforward"; Hendrycks & Gimpel, "Gaussian Error Linear Units".
    """
    _check(h, w1, b1, w2, b2)
    dtype = linear_dtype(h)
    name = choose(_OP, backend, h.device.type, _unsupported(h, w1, b1, w2, b2))
    if name == "reference":
        note(_OP, name)
        if not recompute:
            return reference.mlp(h, w1, b1, w2, b2)
        pre = F.linear(h, w1, b1)  # (B, N, F)
        return checkpoint(_second_half, pre, w2, b2, use_reentrant=False, preserve_rng_state=False)
    # cast here as autocast would, where autograd sees it
    h, w1, b1, w2 = (t.to(dtype) for t in (h, w1, b1, w2))
    b2 = None if b2 is None else b2.to(dtype)
    if is_tracked((h, w1, b1, w2, b2)):
        return _call(h, w1, b1, w2, b2, recompute, name)[0]
    return _inference_op(h, w1, b1, w2, b2, name)


_OP = "mlp"


def _check(h, w1, b1, w2, b2):
    checks.tokens("h", h)
    for name, w in (("w1", w1), ("w2", w2)):
        checks.tensor(name, w, h)
        checks.rank(name, w, "(out, in)", 2)
    checks.shape("w1", w1, "(F, D)", (w1.shape[0], h.shape[-1]))
    checks.tensor("b1", b1, h)
    checks.shape("b1", b1, "(F,)", (w1.shape[0],))
    checks.shape("w2", w2, "(D_out, F)", (w2.shape[0], w1.shape[0]))
    if b2 is not None:
        checks.tensor("b2", b2, h)
        checks.shape("b2", b2, "(D_out,)", (w2.shape[0],))


def _second_half(pre, w2, b2):
    return F.linear(F.gelu(pre, approximate="tanh"), w2, b2)


def _unsupported(h, *weights):
    for t in (h, *weights):
        if t is not None and t.dtype not in DTYPES:
            return f"the kernels take float32, float16 and bfloat16, got {t.dtype}"
    if not autocasts(h) and any(t is not None and t.dtype != h.dtype for t in weights):
        return "the kernels need one dtype for h, weights and biases outside of autocast"
    return None


def _inference(h, w1, b1, w2, b2, backend):
    resolve(_OP, backend, h, h, w1.shape[0])
    rows = h.reshape(-1, h.shape[-1])
    if h.is_cuda:  # GELU in the GEMM's epilogue; this function's CPU version is the erf form
        act = torch._addmm_activation(b1, rows, w1.t(), use_gelu=True)
    else:
        act = F.gelu(F.linear(rows, w1, b1), approximate="tanh")
    return F.linear(act, w2, b2).view(*h.shape[:2], w2.shape[0])


def _inference_fake(h, w1, b1, w2, b2, backend):
    return h.new_empty(*h.shape[:2], w2.shape[0])


def _forward(h, w1, b1, w2, b2, recompute, backend):
    resolve(_OP, backend, h, h, w1.shape[0])
    pre = F.linear(h.reshape(-1, h.shape[-1]), w1, b1)  # (B*N, F)
    act = F.gelu(pre, approximate="tanh")
    y = F.linear(act, w2, b2).view(*h.shape[:2], w2.shape[0])
    return y, pre, pre.new_empty(0) if recompute else act


def _forward_fake(h, w1, b1, w2, b2, recompute, backend):
    pre = h.new_empty(h.shape[0] * h.shape[1], w1.shape[0])
    return _inference_fake(h, w1, b1, w2, b2, backend), pre, pre.new_empty(0) if recompute else torch.empty_like(pre)


def _backward(dy, h, w1, w2, pre, act, needs, backend):
    dy, rows = dy.reshape(-1, w2.shape[0]), h.reshape(-1, h.shape[-1])
    recompute = act.dim() == 1  # what was not kept is an empty vector in its place
    dpre = dy @ w2  # (B*N, F), still after GELU
    if resolve(_OP, backend, h, h, w1.shape[0]) == "triton":
        from ditfast.kernels import gelu

        again, db1 = gelu.backward_(dpre, pre, recompute, w1.dtype)
    else:
        dpre = torch.ops.aten.gelu_backward(dpre, pre, approximate="tanh")
        again, db1 = F.gelu(pre, approximate="tanh") if recompute else None, dpre.sum(0)
    act = again if recompute else act
    return (
        (dpre @ w1).view_as(h) if needs[0] else dy.new_empty(0),
        dpre.t() @ rows if needs[1] else dy.new_empty(0),
        db1,
        dy.t() @ act if needs[3] else dy.new_empty(0),
        dy.sum(0) if needs[4] else dy.new_empty(0),
    )


def _backward_fake(dy, h, w1, w2, pre, act, needs, backend):
    shapes = (h.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    wanted = (needs[0], needs[1], True, needs[3], needs[4])
    return tuple(dy.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


_inference_op = define(
    "mlp_inference(Tensor h, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, str backend) -> Tensor",
    _inference,
    _inference_fake,
)
_forward_op = define(
    "mlp(Tensor h, Tensor w1, Tensor b1, Tensor w2, Tensor? b2, bool recompute, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = define(
    "mlp_backward(Tensor dy, Tensor h, Tensor w1, Tensor w2, Tensor pre, Tensor act, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    h, w1, _, w2, _, _, ctx.backend = inputs
    _, pre, act = output
    ctx.save_for_backward(h, w1, w2, pre, act)
    ctx.mark_non_differentiable(pre, act)


def _autograd_backward(ctx, dy, _dpre, _dact):
    needs = list(ctx.needs_input_grad[:5])
    grads = run(_backward_op, dy, *ctx.saved_tensors, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


reject_double_backward(_OP, _backward_op)
_call = differentiable(_OP, _forward_op, _setup_context, _autograd_backward)
