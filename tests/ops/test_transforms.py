"""Function transforms (torch.func) of every operation on every kernel equal the reference."""

import pytest
import torch
from golden_values import close
from torch.func import grad, grad_and_value, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.log import record
from ditfast.ops.op import PRECISIONS, RandomTensors

CALLS = 2


def device_of(backend):
    return "cuda" if backend != "host" and torch.cuda.is_available() else "cpu"


KERNELS = [
    pytest.param(op, name, id=f"{op.name}-{name}")
    for op in ops.ALL
    for name in op.kernels
    if "fp32" in op.backends[name] and why_not(op, name, device_of(name)) is None
]
each_kernel = pytest.mark.parametrize(("op", "backend"), KERNELS)


class Problem:
    """An operation as a function of a dict of its tensors, with their values."""

    def __init__(self, op, backend):
        tokens = 4 if "attention" in op.name or "patch" in op.name else 2
        arguments = op.arguments(RandomTensors(PRECISIONS["fp32"], device_of(backend)), 2, tokens, 64)
        self.op, self.backend = op, backend
        self.tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
        self.fixed = {name: a for name, a in arguments.items() if name not in self.tensors}

    def outputs(self, backend):
        def function(tensors):
            out = self.op.function(**tensors, **self.fixed, backend=backend)
            return out if isinstance(out, tuple) else (out,)

        return function

    def loss(self, backend):
        function = self.outputs(backend)

        def weighted(tensors):
            return sum((out * ramp(out)).sum() for out in function(tensors))

        return weighted

    def compare(self, transform, inputs):
        """``transform(backend)(inputs)`` on the kernel and on the reference."""
        got, expected = (tree_leaves(transform(backend)(inputs)) for backend in (self.backend, "reference"))
        close(dict(enumerate(got)), dict(enumerate(expected)), 1e-5)

    def calls(self):
        """Inputs of several calls, with ``in_dims``: all differ, or all per-sample ones but the first, or one."""
        every = list(self.tensors)
        per_sample = [name for name in every if name not in self.op.parameters]
        for names in (every, per_sample[1:] or per_sample, every[-1:]):
            dims = {name: -1 if name in names else None for name in every}
            yield {name: stacked(a) if name in names else a for name, a in self.tensors.items()}, (dims,)


def ramp(t):
    return torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)


def stacked(t):
    return torch.stack([factor * t for factor in torch.linspace(0.5, 1.5, CALLS).to(t)], -1)


@pytest.fixture
def problem(op, backend, one_thread):
    return Problem(op, backend)


@each_kernel
def test_gradients(problem):
    problem.compare(lambda backend: grad(problem.loss(backend)), problem.tensors)
    problem.compare(
        lambda backend: jacrev(lambda a: problem.outputs(backend)(a)[-1].flatten()[::97]), problem.tensors
    )

    def pulled_back(backend):
        def run(tensors):
            outputs, pull = vjp(problem.outputs(backend), tensors)
            return outputs, pull(tuple(out.cos() for out in outputs))

        return run

    problem.compare(pulled_back, problem.tensors)


@each_kernel
def test_several_calls(problem):
    """Values and gradients of each call, as for samples or ensembles."""
    for inputs, dims in problem.calls():
        problem.compare(lambda backend, dims=dims: vmap(grad_and_value(problem.loss(backend)), dims), inputs)


@each_kernel
def test_gradient_of_the_sum_of_calls(problem):
    inputs, dims = list(problem.calls())[1]
    problem.compare(lambda backend: grad(lambda a: vmap(problem.loss(backend), dims)(a).sum()), inputs)


@each_kernel
def test_nested(problem):
    """Nested calls, which differ in the first tensor and in the last."""
    first, last = list(problem.tensors)[0], list(problem.tensors)[-1]
    inputs = {**problem.tensors, first: stacked(problem.tensors[first])}
    inputs[last] = torch.stack((inputs[last], 2 * inputs[last]))
    outer, inner = dict.fromkeys(inputs), dict.fromkeys(inputs)
    outer[last], inner[first] = 0, -1
    problem.compare(lambda backend: vmap(vmap(grad(problem.loss(backend)), (inner,)), (outer,)), inputs)


@each_kernel
def test_under_autograd(problem):
    """Ordinary autograd around a vmap."""
    inputs, dims = next(problem.calls())

    def gradients(backend):
        def run(inputs):
            leaves = [t.detach().requires_grad_() for t in inputs.values()]
            loss = vmap(problem.loss(backend), dims)(dict(zip(inputs, leaves, strict=True)))
            return torch.autograd.grad(loss.square().sum(), leaves)

        return run

    problem.compare(gradients, inputs)


@pytest.mark.parametrize("op", [op for op in ops.ALL if op not in (ops.MLP, ops.QKV_ATTENTION, ops.PATCH_EMBED)])
@pytest.mark.parametrize("backend", ("triton",))
def test_calls_with_only_per_sample_tensors_become_one(problem):
    """Forward and backward run once, whatever the number of calls."""
    problem.tensors.pop("bias", None)
    inputs, dims = next(problem.calls())
    with record() as log:
        problem.compare(lambda backend: vmap(grad(problem.loss(backend)), dims), inputs)
    assert [name for ran in log.values() for name in ran].count("triton") == 2


@each_kernel
def test_unsupported_transforms_name_an_alternative(problem, op, backend):
    if op not in (ops.PATCHIFY, ops.UNPATCHIFY):  # linear
        for outer in (jacrev, lambda f: lambda a: jvp(f, (a,), (a,))):
            with pytest.raises(NotImplementedError, match=f"{op.name}: double backward .* use backend='reference'"):
                outer(grad(problem.loss(backend)))(problem.tensors)
