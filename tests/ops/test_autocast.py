"""Autocast reaches no kernel: a backward pass under autocast computes what it does outside of it."""

import contextlib

import pytest
import torch

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.op import PRECISIONS, RandomTensors
from ditfast.ops.registration import attach_autograd, register_op, run_in_backward

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (None, torch.bfloat16, torch.float16)
FORWARDS = {"fp32": ("fp32", None), "fp16": ("fp16", None), "bf16 autocast": ("fp32", torch.bfloat16)}
KERNELS = [
    pytest.param(op, backend, forward, id=f"{op.name}-{backend}-{forward}")
    for op in ops.ALL
    for backend, forwards in (("host", FORWARDS), ("triton", ("fp32",)))
    if backend in op.backends and why_not(op, backend, "cpu") is None
    for forward in forwards
]


def under(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def outputs(op, backend, precision, dtype, **options):
    """Outputs of a small problem computed under autocast to ``dtype``, and its leaves."""
    tokens = 4 if "attention" in op.name or "patch" in op.name else 3
    arguments = op.arguments(RandomTensors(PRECISIONS[precision], "cpu"), 2, tokens, 64)
    leaves = [a.requires_grad_() for a in arguments.values() if isinstance(a, torch.Tensor) and a.is_leaf]
    with under(dtype):
        out = op.function(**arguments, **options, backend=backend)
    return out if isinstance(out, tuple) else (out,), leaves


@pytest.mark.parametrize(("op", "backend", "forward"), KERNELS)
def test_backward(op, backend, forward):
    for options in ({}, {"recompute": True}) if op is ops.MLP else ({},):
        out, leaves = outputs(op, backend, *FORWARDS[forward], **options)
        weights = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in out]
        found = []
        for dtype in DTYPES:
            with under(dtype):
                found.append(torch.autograd.grad(out, leaves, weights, retain_graph=True))
        for gradients in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(gradients, found[0], strict=True))


def test_compiled_backward():
    if why_not(ops.MLP, "host", "cpu") is not None:
        pytest.skip("the extension is not built")
    h, *weights = ops.MLP.arguments(RandomTensors(PRECISIONS["fp32"], "cpu"), 2, 3, 64).values()
    h.requires_grad_()
    out = torch.compile(ops.mlp, backend="aot_eager", fullgraph=True)(h, *weights, backend="host")
    (expected,) = torch.autograd.grad(out.square().sum(), h, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(out.square().sum(), h)
    assert torch.equal(found, expected)


def test_any_operation():
    """Forward, backward and tangents, through the dispatcher and past it."""
    seen = []

    def product(a, b, backend):
        seen.append(torch.is_autocast_enabled("cpu"))
        return a @ b

    op = register_op(
        "autocast_probe(Tensor a, Tensor b, str backend) -> Tensor",
        product,
        lambda a, b, backend: a.new_empty(a.shape[0], b.shape[1]),
        {"a": "M,K", "b": "K,N"},
    )

    def backward(ctx, dout):
        return run_in_backward(op, dout, *ctx.saved_tensors, "reference"), None, None

    def jvp(args, tangents):
        return call(*args), (call(tangents[0], *args[1:]),)

    call = attach_autograd(
        "autocast_probe", op, lambda ctx, inputs, _: ctx.save_for_backward(inputs[1]), backward, jvp
    )
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(op(a, b, "reference"), call(a, b, "reference"))
            and call(a, b, "reference").dtype == torch.float32
        )
        call(a.requires_grad_(), b, "reference").sum().backward()
        torch.func.jvp(lambda a: call(a, b, "reference"), (a.detach(),), (a.detach(),))
        torch.func.grad(lambda a: call(a, b, "reference").sum())(a.detach())
    assert seen == [False] * len(seen) and len(seen) == 9
