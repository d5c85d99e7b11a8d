"""A toy operation in one file, as any new one would be: a projection whose kernel computes in float32.

Run as a script, it prints as JSON what the rest of the package makes of its record.
"""

import json
import os
import sys
from math import prod
from unittest import mock

import torch

from ditfast import doctor, ops
from ditfast.ops import checks, verify
from ditfast.ops.backends import choice, selfcheck
from ditfast.ops.backends.availability import why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.backends.log import note, record
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.flop_counter import install
from ditfast.ops.op import WITHOUT_STREAM, Op
from ditfast.ops.registration import attach_autograd, register_op, reject_double_backward, run_in_backward

FACTOR = float(os.environ.get("TOY_FACTOR", "1"))  # error planted in the kernel's gradient


def project(x, weight, *, backend=None):
    """``x @ weight.T``; x (B, N, D), weight (E, D)."""
    checks.tokens("x", x)
    checks.weight("weight", weight, "(E, D)", x.shape[-1], x.device)
    name = choose(OP, backend, x.device.type, why_not_dtype(x, weight))
    if name == "reference":
        note(OP.name, name)
        return torch.nn.functional.linear(x, weight)
    return _call(x, weight, name)


def _forward(x, weight, backend):
    if resolve(OP, backend, x, x, x.shape[-1]) == "triton":
        return (x.float() @ weight.float().t()).to(x.dtype)
    return x @ weight.t()


def _forward_fake(x, weight, backend):
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _backward(dout, x, weight, backend):
    factor = FACTOR if resolve(OP, backend, x, x, x.shape[-1]) == "triton" else 1
    return dout @ weight * factor, dout.flatten(0, 1).t() @ x.flatten(0, 1)


def _backward_fake(dout, x, weight, backend):
    return torch.empty_like(x), torch.empty_like(weight)


_forward_op = register_op(
    "project(Tensor x, Tensor weight, str backend) -> Tensor",
    _forward,
    _forward_fake,
    {"x": "B,N,D", "weight": "E,D"},
)
_backward_op = register_op(
    "project_backward(Tensor dout, Tensor x, Tensor weight, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    {"dout": "B,N,E", "x": "B,N,D", "weight": "E,D"},
)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, dout):
    return *run_in_backward(_backward_op, dout, *ctx.saved_tensors, ctx.backend), None


reject_double_backward("project", _backward_op)
_call = attach_autograd("project", _forward_op, _setup_context, _autograd_backward)


def _arguments(t, batch, tokens, dim):
    return {"x": t(batch, tokens, dim), "weight": t(2 * dim, dim, spread=dim**-0.5)}


def _self_check(t, dim, backend):
    x, weight = _arguments(t, *t.size, dim).values()
    out = _forward(x, weight, backend)
    dx, dweight = _backward(t(*out.shape), x, weight, backend)
    return {"out": out, "dx": dx, "dweight": dweight}


def _flops(x, weight, *_, **__):
    return 2 * prod(x[:-1]) * prod(weight)


def _backward_flops(dout, x, weight, *_, **__):
    return 2 * _flops(x, weight)


OP = Op(
    name="project",
    function=project,
    backends={"triton": WITHOUT_STREAM, "reference": WITHOUT_STREAM},
    arguments=_arguments,
    outputs=("out",),
    parameters=("weight",),
    self_check=_self_check,
    auto_precisions=WITHOUT_STREAM,
    flops={"project": _flops, "project_backward": _backward_flops},
    moved={"fwd": ("x", "out"), "bwd": ("dout", "x", "dx")},
)


def main():
    from torch.utils.flop_counter import FlopCounterMode

    ops.ALL = (OP,)  # the only one, for speed
    install((OP,))
    x, weight = torch.randn(2, 3, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)

    def ran(**options):
        with record() as log:
            project(x, weight, **options).sum().backward()
        return log["project"]

    with mock.patch.object(choice, "_AUTO_DEVICES", ("cpu",)), mock.patch.object(selfcheck, "SIZE", (2, 9)):
        found = {"automatic": ran(), "named": ran(backend="triton")}
        with choice.use_backend("reference"):
            found["context"] = ran()
        verdicts = verify.verify("cpu", (32,), ("bf16", "fp32"))
    found["verify"] = {f"{r.backend} {r.stream} {r.width}": r.reason for r in verdicts}
    with FlopCounterMode(display=False) as counter:
        project(x, weight, backend="triton").sum().backward()
    found["flops"] = counter.get_total_flops()
    found["doctor"] = doctor.operations("cpu")["backends"]["project"]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
