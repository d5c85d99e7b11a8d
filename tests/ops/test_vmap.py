"""vmap of every registered operation, whatever is mapped, equals calls one by one."""

import random

import pytest
import torch
from ops.registered import available, on_formulas, registered_calls
from ops.test_bad_input import OPS
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from ditfast import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def several(t):
    """One tensor for each of two calls."""
    return [t, 0.5 * t]


def in_dims(args, backend):
    """Which arguments differ between calls, and their dimension of the calls: all, each alone, and some at random."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    rng = random.Random(0)
    every = [dict.fromkeys(tensors, 0), dict.fromkeys(tensors, -1)]
    every += [{i: -1} for i in tensors]
    every += [{i: rng.choice((0, 1, -1)) for i in tensors if rng.random() < 0.5} for _ in range(3)]
    few = every if backend != "triton" else rng.sample(every, 2)  # the interpreter is slow
    return [tuple(dims.get(i) for i in range(len(args))) for dims in few if dims]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("batch", (1, 2, 3))
@pytest.mark.parametrize("backend", ("host", "reference", pytest.param("triton", marks=pytest.mark.slow)))
def test_equals_calls_one_by_one(backend, batch, name):
    kernel = backend if backend != "reference" else available(name)
    for op, args in registered_calls(name, kernel, batch).items():
        args = on_formulas(op, args) if backend == "reference" else args
        for dims in in_dims(args, backend):
            pairs = list(zip(args, dims, strict=True))
            mapped = [a if dim is None else torch.stack(several(a), dim) for a, dim in pairs]
            got = tree_leaves(vmap(op, dims)(*mapped))
            calls = [tree_leaves(op(*(a if dim is None else several(a)[i] for a, dim in pairs))) for i in range(2)]
            for g, expected in zip(got, zip(*calls, strict=True), strict=True):
                torch.testing.assert_close(g, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_jacobian_of_one_sample():
    """What is saved for backward is the same for every row of the Jacobian."""
    x, shift, scale = torch.randn(1, 3, 8), torch.randn(1, 8), torch.randn(1, 8)
    kernel, reference = (
        torch.func.jacrev(lambda *a, b=b: ops.layer_norm_modulate(*a, backend=b), (0, 1, 2))(x, shift, scale)
        for b in (available("layer_norm_modulate"), "reference")
    )
    torch.testing.assert_close(kernel, reference, rtol=1e-4, atol=1e-5)
