"""Function transforms (torch.func) of a whole model give the reference's results, on kernels and by default."""

import contextlib

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from ditfast.models import DiTBlock
from ditfast.ops.backends.choice import use_backend

BACKENDS = ((), ("triton", "host"))


@contextlib.contextmanager
def on(names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(use_backend(name))
        yield


@pytest.fixture
def case(kit):
    """A model, its parameters, a loss as a function of parameters and batch, and a batch."""
    model = kit.tiny(input_size=4, depth=1)
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, t, y = kit.arr("x", (2, 4, 4, 4)), torch.tensor([999, 3]), torch.tensor([1, 7])
    weights = kit.arr("weights", (8, 4, 4))

    def loss(params, x, t, y):
        return (functional_call(model, params, (x, t, y)) * weights).sum()

    return model, params, loss, (x, t, y)


def compare(kit, names, transformed):
    with on(["reference"]):
        expected = transformed()
    with on(names):
        kit.close(transformed(), expected, 1e-5)


@pytest.mark.parametrize("names", BACKENDS, ids="+".join)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample(kit, case, names):
    _, params, loss, batch = case

    def of_one(params, x, t, y):
        return loss(params, x[None], t[None], y[None])

    compare(kit, names, lambda: vmap(grad(of_one), (None, 0, 0, 0))(params, *batch))


@pytest.mark.parametrize("names", BACKENDS, ids="+".join)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ensemble(kit, case, names):
    model, _, loss, batch = case
    other = kit.tiny(input_size=4, depth=1)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.2)
    params, _ = stack_module_state([model, other])
    compare(kit, names, lambda: vmap(grad(loss), (0, None, None, None))(params, *batch))


@pytest.mark.parametrize("options", ({}, {"conditioning": "cross_attention"}), ids=str)
def test_tangents_by_default(kit, options):
    """Most paths of PyTorch's attention have none; the model takes the one that does."""
    model, (x, t, y) = kit.tiny(depth=2, **options), kit.batch()
    compare(kit, (), lambda: jvp(lambda x: model(x, t, y), (x,), (x.cos(),))[1])


def test_tangents_of_normed_heads(kit):
    block, (x, c) = kit.fill(DiTBlock(32, 2, qk_norm=True)), (kit.arr("x", (2, 5, 32)), kit.arr("c", (2, 32)))
    tangent = jvp(lambda x: block(x, c), (x,), (x.cos(),))[1]
    step = 1e-3
    numeric = (block(x + step * x.cos(), c) - block(x - step * x.cos(), c)) / (2 * step)
    kit.close(tangent, numeric, 1e-3)
