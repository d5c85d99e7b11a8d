"""The MLP in one autograd node meets the numerical contract."""

import contextlib
import sys
import weakref

import pytest
import torch
from contract import compare, run
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import ops

# the interpreter computes exp(large) with numpy, which warns; on a GPU it is inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = ("y", "dh", "dw1", "db1", "dw2", "db2")
PARAMETERS = NAMES[2:]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float32}


def inputs(kind, b, n, d, f, device, b2=True, dtype=None):
    g = torch.Generator().manual_seed(3)
    shapes = ((b, n, d), (f, d), (f,), (d, f), (d,))
    spreads = (1.0, d**-0.5, 0.5, f**-0.5, 0.5)
    values = [(torch.randn(s, generator=g) * k).to(DTYPES[kind]) for s, k in zip(shapes, spreads, strict=True)]
    values[0] *= 3  # GELU's bend and both tails
    values = [t.to(device, dtype or t.dtype).requires_grad_() for t in values]
    if kind == "mixed" and dtype is None:  # as in the model: h comes in the autocast dtype, weights do not
        values[0] = values[0].detach().bfloat16().requires_grad_()
    return values if b2 else [*values[:4], None]


def call(kind, device, recompute):
    def fn(*args, backend):
        context = torch.autocast(device, torch.bfloat16) if kind == "mixed" else contextlib.nullcontext()
        with context:
            return ops.mlp(*args, recompute, backend=backend)

    return fn


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", ((3, 7, 48, 200), (2, 77, 96, 384), (1, 1, 8, 1536), (3, 257, 16, 520)))
def test_contract(shape, kind, recompute, device, poisoned):
    b, n, d, _ = shape
    out = torch.bfloat16 if kind == "mixed" else DTYPES[kind]
    weights = [torch.randn(b, n, d, generator=torch.Generator().manual_seed(4)).to(device, out)]
    compare(
        call(kind, device, recompute),
        lambda dtype: inputs(kind, *shape, device, dtype=dtype),
        names=NAMES,
        parameters=PARAMETERS,
        weights=weights,
        backend="triton",
    )


def test_recompute_changes_only_what_is_kept(device):
    results, kept = [], []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            args = inputs("fp32", 2, 5, 16, 64, device)
            out = ops.mlp(*args, recompute, backend="triton")
        kept.append(sum(sizes))
        results.append(torch.autograd.grad(out.square().sum(), args))
    assert kept[0] - kept[1] == 2 * 5 * 64
    for name, a, b in zip(NAMES[1:], *results, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_recomputation_gives_way_to_function_transforms():
    """On the reference, whose checkpoint they do not support."""
    args = [t.detach() for t in inputs("fp32", 2, 5, 16, 64, "cpu")]
    found = []
    for recompute in (False, True):

        def loss(*args, recompute=recompute):
            return ops.mlp(*args, recompute, backend="reference").square().sum()

        every = tuple(range(5))
        found.append(torch.func.grad(loss, every)(*args))
        found.append(torch.compile(torch.func.grad(loss, every), backend="aot_eager", fullgraph=True)(*args))
        in_loop = torch.func.vmap(torch.func.grad(loss, every), (0, *[None] * 4))(args[0][None], *args[1:])
        found.append([t[0] for t in in_loop])
    for gradients in found[1:]:
        torch.testing.assert_close(tuple(gradients), tuple(found[0]))


def test_without_the_second_bias(device):
    args = inputs("fp32", 2, 5, 16, 64, device, b2=False)
    got, expected = (ops.mlp(*args, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected)


def test_inference_casts_weights_once_under_autocast(device):
    if device == "cpu":  # how the cache is queried; on CPUs, autocast does not know it
        assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::einsum", "AutocastCUDA")
        return
    args = inputs("mixed", 2, 5, 16, 64, device)
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                casts.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with torch.autocast(device, torch.bfloat16), torch.no_grad(), Casts():
        first, second = (ops.mlp(*args, backend="triton") for _ in range(2))
    assert sorted(casts) == sorted(tuple(t.shape) for t in args[1:])
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", DTYPES)
def test_inference_agrees_with_training(kind, device):
    args = inputs(kind, 3, 7, 48, 200, device)
    fn = call(kind, device, False)
    trained = fn(*args, backend="triton")
    with torch.no_grad():
        inferred = fn(*args, backend="triton")
    assert inferred.dtype == trained.dtype and not inferred.requires_grad
    eps = torch.finfo(trained.dtype).eps
    torch.testing.assert_close(inferred, trained, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("frozen", range(5))
def test_frozen_arguments_get_no_gradient(frozen, device):
    """An adapted model's weights are frozen: their gradients are neither returned nor computed."""
    grads = []
    for name in ("triton", "reference"):
        args = inputs("fp32", 2, 5, 16, 64, device)
        args[frozen].requires_grad_(False)
        leaves = [t for t in args if t.requires_grad]
        grads.append(torch.autograd.grad(ops.mlp(*args, backend=name).square().sum(), leaves))
        assert args[frozen].grad is None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_repeats_are_bit_equal(device):
    args = inputs("bf16", 3, 33, 48, 600, device)
    weights = [torch.ones(3, 33, 48, dtype=torch.bfloat16, device=device)]
    first, second = (run(lambda *a: ops.mlp(*a, True, backend="triton"), args, weights) for _ in range(2))
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


def test_many_chunks_of_rows(device):
    """More than 64 partials, so that the fixed-order sum takes several rounds."""
    args = inputs("fp32", 2, 600, 8, 24, device)
    grads = [torch.autograd.grad(ops.mlp(*args, backend=n).square().sum(), args) for n in ("triton", "reference")]
    for name, a, b in zip(NAMES[1:], *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_inf_propagate(value, device):
    for name in ("triton", "reference"):
        args = inputs("fp32", 3, 4, 16, 64, device)
        with torch.no_grad():
            args[0][1, 2, 3] = value
        out = ops.mlp(*args, backend=name)
        grad = torch.autograd.grad(out.sum(), args[0])[0]
        for t in (out, grad):
            assert not torch.isfinite(t[1, 2]).all()
            assert torch.isfinite(t[0]).all() and torch.isfinite(t[2]).all()


@pytest.mark.parametrize("kind", ("fp32", "bf16"))
@pytest.mark.parametrize("requires_grad", (True, False))
@pytest.mark.parametrize("recompute", (True, False))
def test_opcheck(kind, requires_grad, recompute):
    args = [t.requires_grad_(requires_grad) for t in inputs(kind, 2, 3, 16, 32, "cpu")]
    torch.library.opcheck(torch.ops.ditfast.mlp.default, (*args, recompute, "triton"))
    if not requires_grad:
        torch.library.opcheck(torch.ops.ditfast.mlp_inference.default, (*args, "triton"))


@pytest.mark.parametrize("kind", ("fp32", "mixed"))
def test_compiles_fullgraph(kind, device):
    fn = call(kind, device, True)
    compiled = torch.compile(lambda *a: fn(*a, backend="triton"), fullgraph=True, backend="aot_eager")
    for n in (5, 6, 9):
        args = inputs(kind, 2, n, 16, 64, device)
        weights = [torch.randn(2, n, 16, device=device).to(torch.bfloat16 if kind == "mixed" else torch.float32)]
        eager, graph = (run(f, args, weights) for f in (lambda *a: fn(*a, backend="triton"), compiled))
        for name, a, b in zip(NAMES, eager, graph, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("recompute", (False, True))
def test_the_gradient_before_gelu_is_freed_before_w2s_is_made(recompute, device, monkeypatch):
    """Both at once would be the peak of a block's backward."""
    multiply, products, living = torch.matmul, [], []

    def product(a, b):
        living.append([each() is not None for each in products])
        out = multiply(a, b)
        products.append(weakref.ref(out))
        return out

    args = inputs("fp32", 2, 3, 16, 32, device)
    out = ops.mlp(*args, recompute, backend="triton").sum()
    monkeypatch.setattr(torch, "matmul", product)
    grads = torch.autograd.grad(out, args)
    assert len(living) == len(products) == 4  # dact, which becomes dpre; dh, dw1, dw2
    assert living[-2] == [True, True] and living[-1] == [False, True, True]
    assert all(g.shape == a.shape for g, a in zip(grads, args, strict=True))


def test_formulas_meet_the_contract(device, monkeypatch):
    """These run inside the operation if an expected kernel is not used."""
    monkeypatch.setattr(sys.modules[ops.mlp.__module__], "resolve", lambda *_: "reference")
    weights = [torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(4)).bfloat16().to(device)]
    for recompute in (False, True):
        compare(
            call("bf16", device, recompute),
            lambda dtype: inputs("bf16", 3, 7, 48, 200, device, dtype=dtype),
            names=NAMES,
            parameters=PARAMETERS,
            weights=weights,
            backend="triton",
        )


@pytest.mark.parametrize("recompute", (False, True))
def test_empty_batch(device, recompute):
    args = inputs("fp32", 0, 5, 16, 64, device)
    out = ops.mlp(*args, recompute, backend="triton")
    grads = torch.autograd.grad(out.sum(), args)
    assert out.shape == (0, 5, 16)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(grads, args, strict=True))
