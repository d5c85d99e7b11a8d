"""Large float32 products in C++ on the CPU, held to the numerical contract."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract, compare
from ops.test_mlp import NAMES, PARAMETERS, call, inputs

import ditfast
from ditfast import ops
from ditfast.ops import gemm, host
from ditfast.ops.backends import on_cpu

pytestmark = pytest.mark.usefixtures("one_thread")
# rows, inner, columns: no tile, piece or block is full, and several of each
SIZES = (
    (1, 1, 1),
    (5, 3, 7),
    (13, 1, 33),
    (97, 300, 200),
    (31, 530, 801),
    (430, 20, 401),
    (401, 20, 430),
    (100, 770, 12),
)
LAYOUTS = tuple(product((False, True), repeat=2))  # whether each matrix lies with its columns together


def lying(t, is_turned):
    return t.t().contiguous().t() if is_turned else t


def problem(rows, inner, columns):
    g = torch.Generator().manual_seed(6)
    shapes = (rows, inner), (inner, columns), (columns,)
    return [torch.randn(shape, generator=g) for shape in shapes]


def check(size):
    """With and without a bias, in every layout; the same bits in all of them. Returns what came out."""
    a, b, bias = problem(*size)
    results = []
    for row in (bias, None):
        low, exact = (
            F.linear(a, b.t(), row),
            F.linear(a.double(), b.t().double(), None if row is None else row.double()),
        )
        laid = [(lying(a, first), lying(b, second), row) for first, second in LAYOUTS]
        found = [host.product(*operands) for operands in laid]
        assert_contract(f"{size}", found[0], low, exact)
        assert all(torch.equal(found[0], other) for other in found)
        results.append(found[0])
        check_gelu(laid, found[0])
    return results


def check_gelu(laid, expected):
    """Of the product, with the bits of a pass of its own, whether the product is kept or not."""
    for operands in laid:
        kept, act = host.product_gelu(*operands, keep_product=True)
        none, alone = host.product_gelu(*operands, keep_product=False)
        assert none is None and torch.equal(act, alone)
        assert torch.equal(kept, expected) and torch.equal(act, host.gelu(kept))


@pytest.mark.parametrize("size", SIZES)
def test_contract(size, isa, poisoned):
    check(size)


def test_what_is_packed_at_once_is_bounded(poisoned):
    """Three times as many columns, of a long sum, as fit into the workspace."""
    a, b, _ = problem(150, 1 << 17, 150)
    assert_contract("c", host.product(a, b), a @ b, a.double() @ b.double())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bit_equal_for_any_number_of_threads(layout, with_threads):
    for size in ((300, 300, 850), (850, 530, 300)):
        a, b, bias = problem(*size)
        a, b = (lying(t, turned) for t, turned in zip((a, b), layout, strict=True))
        first, *others = (with_threads(n, host.product_gelu, a, b, bias, True) for n in (1, 2, 7))
        for other in others:
            assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite_stays_so(value, isa):
    """In its row and column, and nowhere else."""
    for size in ((13, 300, 33), (40, 20, 13)):
        a, b, bias = problem(*size)
        a[12, 0], b[-1, -1] = value, value
        bad = torch.zeros(size[0], size[2], dtype=torch.bool)
        bad[12], bad[:, -1] = True, True
        for first, second in LAYOUTS:
            assert torch.equal(~host.product(lying(a, first), lying(b, second), bias).isfinite(), bad)


@pytest.fixture
def taken(monkeypatch):
    """The kernel wins everywhere, whatever this CPU is; how often it ran."""
    monkeypatch.setattr(on_cpu, "takes_onednn", lambda *_: False)
    monkeypatch.setattr(on_cpu, "takes_product", lambda dtype, *sizes: dtype == torch.float32 and min(sizes) > 0)
    monkeypatch.setattr(on_cpu, "product_is_right", lambda dtype, width: True)
    monkeypatch.setattr(on_cpu, "NODE_FROM", 1)
    seen, run = [], host._product_into
    monkeypatch.setattr(host, "_product_into", lambda *args: seen.append(1) or run(*args))
    return seen


def test_mlp_and_its_gradients(taken):
    shape = 3, 17, 16, 72
    weights = [torch.randn(3, 17, 16, generator=torch.Generator().manual_seed(4))]
    compare(
        call("fp32", "cpu", False),
        lambda dtype: inputs("fp32", *shape, "cpu", dtype=dtype),
        names=NAMES,
        parameters=PARAMETERS,
        weights=weights,
        backend="host",
    )
    assert len(taken) == 6


def test_qkv_attention_and_its_gradients(taken):
    def make(dtype):
        g = torch.Generator().manual_seed(2)
        shapes = ((2, 9, 24), 1.0), ((72, 24), 0.1), ((72,), 0.5)
        tensors = [torch.randn(shape, generator=g) * spread for shape, spread in shapes]
        return [t.to(dtype or torch.float32).requires_grad_() for t in tensors]

    compare(
        lambda h, w, b, backend: ops.qkv_attention(h, w, b, 3, backend=backend),
        make,
        names=("out", "dh", "dweight", "dbias"),
        parameters=("dweight", "dbias"),
        weights=[torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(3))],
        backend="host",
    )
    assert len(taken) == 3


def linear_problem(dtype=None):
    g = torch.Generator().manual_seed(9)
    tensors = torch.randn(2, 9, 24, generator=g), torch.randn(40, 24, generator=g) * 0.2
    return [t.to(dtype or torch.float32).requires_grad_() for t in tensors]


def linear(x, weight, backend):
    return gemm.linear_with_autograd(x, weight, None, (backend,))


def test_a_linear_and_its_gradients(taken):
    weights = [torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(3))]
    names = "y", "dx", "dweight"
    compare(linear, linear_problem, names=names, parameters=names[2:], weights=weights, backend="host")
    assert len(taken) == 3
    x, weight = linear_problem()
    linear(x, weight.detach(), "host").sum().backward()  # of zero strides, which the kernel does not take
    torch.testing.assert_close(x.grad, F.linear(torch.ones(2, 9, 40), weight.t()))
    assert len(taken) == 4


def test_gradients_of_a_linear_do_not_see_autocast(taken):
    x, weight = linear_problem()
    for dout in (torch.ones(2, 9, 40).cos(), torch.ones(()).expand(2, 9, 40)):  # by the kernel, and by PyTorch
        y = linear(x, weight, "host")
        expected = torch.autograd.grad(y, (x, weight), dout, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, (x, weight), dout)
        assert all(map(torch.equal, found, expected))


def test_gradients_of_a_linear_may_be_differentiated_and_batched(taken):
    x, weight = linear_problem()
    results = []
    for backend in ("host", "reference"):
        y = linear(x, weight, backend)
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), (x, weight))
        directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(2))
        batched = torch.autograd.grad(linear(x, weight, backend), (x, weight), directions, is_grads_batched=True)
        results.append((*first, *second, *batched))
    assert len(taken) == 4  # twice forward, and the part of the second derivative that passes through y
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_tangents(taken):
    args = inputs("fp32", 3, 17, 16, 72, "cpu")
    primals = [t.detach() for t in args if torch.is_tensor(t)]
    tangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(8)) for t in primals]

    def jvp(backend, dtype=torch.float32):
        both = (tuple(t.to(dtype) for t in ts) for ts in (primals, tangents))
        return torch.func.jvp(lambda *a: ops.mlp(*a, backend=backend), *both)

    got, low, exact = jvp("host"), jvp("reference"), jvp("reference", torch.float64)
    assert len(taken) == 6
    for name, *tensors in zip(("y", "y_t"), got, low, exact, strict=True):
        assert_contract(name, *tensors)


def test_a_model_trains_on_it(taken):
    """All gradients of a model; the kernel runs in each block, forward and backward."""
    torch.manual_seed(7)
    model = ditfast.DiT(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=5).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():  # gates start at zero
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 50, 900]), torch.tensor([0, 2, 4])

    def gradients(dtype, backend):
        module = model.to(dtype)
        with ditfast.use_backend(backend):
            loss = module(x.to(dtype), t, y).square().mean()
            return torch.autograd.grad(loss, tuple(trained.values()))

    got, low, exact = (
        gradients(*how)
        for how in ((torch.float32, "host"), (torch.float32, "reference"), (torch.float64, "reference"))
    )
    for name, *tensors in zip(trained, got, low, exact, strict=True):
        assert_contract(name, *tensors, per_sample=False)
    assert len(taken) == 2 * 12


X, W, B = torch.randn(6, 8), torch.randn(10, 8), torch.randn(10)
LEFT = {
    "neither dimension together": (torch.randn(12, 16)[::2, ::2], W, B),
    "one row for all": (X[:1, :1].expand(6, 8), W, B),
    "strided bias": (X, W, torch.randn(20)[::2]),
    "a bias for all": (X, W, B[:1]),
    "no rows": (X[:0], W, B),
    "float64": (X.double(), W.double(), B.double()),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_it_does_not_take_is_left_to_pytorch(taken, name):
    torch.testing.assert_close(gemm.linear(*LEFT[name]), F.linear(*LEFT[name]))
    assert not taken


def test_what_does_not_fit_is_refused(taken):
    for change in ((X[:, :7], W, B), (X, W, B[:9]), (X, W.double(), B), (X, W, B.double())):
        with pytest.raises(RuntimeError):
            gemm.linear(*change)
    assert not taken


def test_inference_takes_it_where_nothing_differentiates(taken, monkeypatch):
    x = X.view(2, 3, 8)
    torch.testing.assert_close(gemm.linear_with_autograd(x, W, B, ("auto",)), F.linear(x, W, B))
    assert taken.pop()
    for weight, backends in ((W, ("reference",)), (W.clone().requires_grad_(), ("auto",))):
        gemm.linear_with_autograd(x, weight, B, backends)  # with gradients, PyTorch also sums up the bias's
    with torch.autocast("cpu"):
        gemm.linear_with_autograd(x, W, B, ("auto",))
    monkeypatch.setattr(on_cpu, "product_is_right", lambda dtype, width: False)
    gemm.linear_with_autograd(x, W, B, ("auto",))
    assert not taken


def test_only_large_products_on_measured_cpus(monkeypatch):
    monkeypatch.setattr(on_cpu, "PRODUCTS", (on_cpu.isa(),))
    monkeypatch.setattr(on_cpu, "_has_amx", lambda: False)
    large = on_cpu.PRODUCT_FROM
    assert on_cpu.takes_product(torch.float32, large, large, large)
    assert not on_cpu.takes_product(torch.float32, large, large - 1, large)
    assert not on_cpu.takes_product(torch.bfloat16, large, large, large)
    torch.set_float32_matmul_precision("medium")
    assert not on_cpu.takes_product(torch.float32, large, large, large)
    torch.set_float32_matmul_precision("highest")
    if on_cpu._PRECISION is not None:
        before = on_cpu._PRECISION.fp32_precision
        for precision, takes in (("bf16", False), ("ieee", True)):  # the other setting may not be read meanwhile
            on_cpu._PRECISION.fp32_precision = precision
            assert on_cpu.takes_product(torch.float32, large, large, large) == takes
        on_cpu._PRECISION.fp32_precision = before
    for name, value in (("PRODUCTS", ()), ("_has_amx", lambda: True)):
        with monkeypatch.context() as patch:
            patch.setattr(on_cpu, name, value)
            assert not on_cpu.takes_product(torch.float32, large, large, large)
            assert on_cpu._faster_from("mlp", torch.float32, torch.float32) is None
