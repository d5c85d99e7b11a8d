"""Eager calls go past the dispatcher, and nothing that it does is lost."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.bypass import is_intercepted
from ditfast.ops.op import PRECISIONS, RandomTensors

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
BACKEND = "host" if why_not(ops.MLP, "host", "cpu") is None else "triton"
NAME = "ditfast.layer_norm_modulate.default"
if why_not(ops.MLP, BACKEND, "cpu") is not None:
    pytest.skip("no kernel runs here", allow_module_level=True)


def problem(op):
    tokens = 4 if "attention" in op.name or "patch" in op.name else 3
    arguments = op.arguments(RandomTensors(PRECISIONS["fp32"], "cpu"), 2, tokens, 64)
    tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
    fixed = {name: a for name, a in arguments.items() if name not in tensors}

    def call(*values):
        out = op.function(**dict(zip(tensors, values, strict=True)), **fixed, backend=BACKEND)
        return out if isinstance(out, tuple) else (out,)

    return call, list(tensors.values())


def norm(x, row):
    return ops.layer_norm_modulate(x, row, row, backend=BACKEND)


def inputs(**options):
    return torch.randn(2, 3, 64, **options), torch.randn(2, 64)


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_lazy_signs_and_zeros(op):
    """A tensor may be minus its memory, as the imaginary part of a conjugate is, or zeros without memory."""
    call, tensors = problem(op)
    for lazy in (torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)):
        for i, t in enumerate(tensors):
            changed, dense = ([*tensors[:i], t_, *tensors[i + 1 :]] for t_ in (lazy(t), lazy(t) + 0))
            assert dense[i].data_ptr() and not dense[i].is_neg()
            assert same(call(*changed), call(*dense))

        def tangents(change, lazy=lazy):
            return torch.func.jvp(call, tuple(tensors), tuple(change(lazy(t)) for t in tensors))[1]

        def gradients(change, lazy=lazy):
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = call(*leaves)
            return torch.autograd.grad(out, leaves, [change(lazy(t)) for t in out])

        for found in (tangents, gradients):
            assert same(found(lambda t: t), found(lambda t: t + 0))


def test_modes_see_the_operation():
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen.clear()
        with mode():
            norm(*inputs())
        assert NAME in seen
    with FakeTensorMode():
        assert type(norm(*inputs())) is not torch.Tensor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        norm(*inputs())
    assert "ditfast::layer_norm_modulate" in {event.key for event in profile.key_averages()}
    with torch.device("cpu"):  # a mode that is no reason to
        assert not is_intercepted(inputs())


def test_subclasses_see_the_operation():
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    x, row = inputs()
    assert type(norm(x.as_subclass(Tagged), row)) is Tagged and NAME in seen
    for i in (0, 1):
        seen.clear()
        norm(*(t.as_subclass(Tagged) if i == j else t for j, t in enumerate((x, row))))
        assert NAME in seen


def test_tensors_that_outlived_their_transform():
    (x, row), wrapped = inputs(), []
    torch.func.grad(lambda x: wrapped.append(x) or x.sum())(x)
    assert torch.equal(norm(wrapped[0], row), norm(x, row))


def test_autograd_rules():
    x, row = inputs(requires_grad=True)
    with torch.no_grad():
        assert not norm(x, row).requires_grad
    with torch.inference_mode():
        assert norm(x, row).is_inference()
        frozen = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        norm(x, frozen)
    other = x.detach().clone()
    out = norm(other, row.clone().requires_grad_())
    out.mul_(2)  # an output may be written to
    assert torch.equal(out, 2 * norm(other, row))
    other.mul_(2)  # an input that was saved may not
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    qkv = torch.randn(2, 4, 3 * 64, requires_grad=True)
    out = ops.attention(qkv, 1, backend=BACKEND)
    out.mul_(2)  # nor an output that was saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_determinism_is_kept():
    x, row = inputs()
    expected = norm(x, row)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(norm(x, row), expected)
    finally:
        torch.use_deterministic_algorithms(False)
