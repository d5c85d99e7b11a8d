"""Autograd may say None instead of zeros: a function upstream may return no gradient."""

import pytest
import torch
from torch.autograd import forward_ad

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.op import PRECISIONS, RandomTensors

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
KERNELS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in ops.ALL
    for backend in ("host", "triton")
    if backend in op.backends and why_not(op, backend, "cpu") is None
]


class Cut(torch.autograd.Function):
    """Return the input; its gradient is None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def gradients(op, backend, cut, has_tangents):
    """Gradients of all outputs but the ``cut``."""
    tokens = 4 if "attention" in op.name or "patch" in op.name else 3
    arguments = op.arguments(RandomTensors(PRECISIONS["fp32"], "cpu"), 2, tokens, 64)
    leaves = [a.requires_grad_() for a in arguments.values() if isinstance(a, torch.Tensor)]
    with forward_ad.dual_level():
        if has_tangents:
            name, first = next(iter(arguments.items()))
            arguments[name] = forward_ad.make_dual(first, torch.ones_like(first))
        out = op.function(**arguments, backend=backend)
        outputs = [forward_ad.unpack_dual(t).primal for t in (out if isinstance(out, tuple) else (out,))]
        total = sum((Cut.apply(t) if i in cut else t).sum() for i, t in enumerate(outputs))
        return torch.autograd.grad(total, leaves, allow_unused=True)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
def test_all_outputs(op, backend):
    every = range(len(op.outputs))
    for has_tangents in (False, True):
        assert not any(g is not None and g.any() for g in gradients(op, backend, every, has_tangents))


@pytest.mark.parametrize("backend", [case.values[1] for case in KERNELS if case.values[0] is ops.JUNCTION])
def test_one_of_two_outputs(backend):
    for cut in ((0,), (1,)):
        expected = gradients(ops.JUNCTION, "reference", cut, False)
        for has_tangents in (False, True):
            found = gradients(ops.JUNCTION, backend, cut, has_tangents)
            for g, e in zip(found, expected, strict=True):
                torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=1e-4, atol=1e-4)
