"""GELU in C++ on the CPU, around torch's GEMMs, meets the numerical contract."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_contract, compare
from ops.test_mlp import NAMES, PARAMETERS, call, inputs

from ditfast import ops
from ditfast.ops import host

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ("fp32", "fp16", "bf16", "mixed")


@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ((3, 17, 16, 72), (0, 5, 16, 64)))
def test_contract(shape, kind, recompute, poisoned):
    b, n, d, _ = shape
    out = torch.bfloat16 if kind == "mixed" else {"fp32": DTYPES[0], "bf16": DTYPES[1], "fp16": DTYPES[2]}[kind]
    weights = [torch.randn(b, n, d, generator=torch.Generator().manual_seed(4)).to(out)]
    compare(
        call(kind, "cpu", recompute),
        lambda dtype: inputs(kind, *shape, "cpu", dtype=dtype),
        names=NAMES,
        parameters=PARAMETERS,
        weights=weights,
        backend="host",
    )


def problem(dtype, rows, width, spread=3.0):
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(rows, width, generator=g) * spread).to(dtype) for _ in range(2)]


def reference(pre, dact):
    """act, dpre, dbias."""
    pre = pre.clone().requires_grad_()
    act = F.gelu(pre, approximate="tanh")
    (dpre,) = torch.autograd.grad(act, pre, dact)
    return act.detach(), dpre, dpre.sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", ((1, 9), (5, 7), (700, 24), (65, 40)))
@pytest.mark.parametrize("spread", (0.01, 3.0, 30.0))
def test_kernels_alone(rows, width, spread, dtype, isa):
    """Any width, and both of GELU's tails."""
    pre, dact = problem(dtype, rows, width, spread)
    low, exact = reference(pre, dact), reference(pre.double(), dact.double())
    act, dpre = host.gelu(pre), dact.clone()
    recomputed, dbias = host.gelu_backward_(dpre, pre, True)
    assert torch.equal(act, recomputed)
    for name, *tensors in zip(("act", "dpre", "dbias"), (act, dpre, dbias), low, exact, strict=True):
        assert_contract(name, *tensors, per_sample=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_of_number(dtype, isa):
    """Powers of two of both signs, from subnormals to the largest: each is close enough, not only their mean."""
    info = torch.finfo(dtype)
    powers = 2.0 ** torch.arange(torch.tensor(info.tiny).log2().int() - 6, torch.tensor(info.max).log2().int() + 1)
    pre = torch.cat([powers, -powers]).to(dtype).view(1, -1)
    pre = pre[pre.isfinite()].view(1, -1)
    x = pre.double()
    z = (8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)  # not by tanh, which cancels even in float64
    got, exact = host.gelu(pre).double(), x * torch.sigmoid(z)
    relative = 4 * info.eps + 2 * z.abs() * torch.finfo(torch.float32).eps
    # the smallest sigmoid is 2^-126
    allowed = exact.abs() * relative + x.abs() * 2.0**-125 + info.tiny * info.eps
    assert ((got - exact).abs() <= allowed).all()


def check_far_tails(dtype):
    """Derivative 0 on the left and 1 on the right, however far; NaN at infinity, as in PyTorch."""
    far = torch.tensor([[10.25, 15, 30, 6e4, 1e14, 1e20, 3e38, float("inf")]]).to(dtype)
    pre = torch.cat([-far, far], dim=1)
    gradient = torch.full_like(pre, 2.0)
    act_of_pass, tangent = host.gelu_jvp(pre, gradient)
    act, dbias = host.gelu_backward_(gradient, pre, True)
    expected = pre.clamp(min=0).where(pre != -float("inf"), float("nan"))
    for t in (act, act_of_pass, host.gelu(pre)):
        torch.testing.assert_close(t, expected, atol=0, rtol=0, equal_nan=True)
    slope = (2.0 * (pre > 0)).where(pre.isfinite(), float("nan")).to(dtype)
    for t in (gradient, tangent, dbias[None]):
        torch.testing.assert_close(t, slope, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_tails(dtype, isa):
    check_far_tails(dtype)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("at", (0, 15, 16, 39))
def test_non_finite_values_propagate(value, at, isa):
    for dtype in DTYPES:
        pre, dact = problem(dtype, 3, 40)
        pre[1, at] = value
        act, dpre = host.gelu(pre), dact.clone()
        _, dbias = host.gelu_backward_(dpre, pre, False)
        bad = torch.zeros(3, 40, dtype=torch.bool)
        bad[1, at] = True
        assert torch.equal(~act.isfinite(), bad)
        if value != value:
            assert torch.equal(~dpre.isfinite(), bad) and torch.equal(~dbias.isfinite(), bad.any(0))
        dact[2, at] = value
        host.gelu_backward_(dact, pre, False)
        assert not dact[2, at].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_for_any_number_of_threads(dtype, with_threads):
    pre, dact = problem(dtype, 700, 72)

    def results():
        dpre = dact.clone()
        return host.gelu(pre), dpre, *host.gelu_backward_(dpre, pre, True)

    first, *others = (with_threads(n, results) for n in (1, 2, 7))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_opcheck():
    for requires_grad in (True, False):
        args = [t.requires_grad_(requires_grad) for t in inputs("bf16", 2, 3, 16, 32, "cpu")]
        torch.library.opcheck(torch.ops.ditfast.mlp.default, (*args, True, "host"))
    torch.library.opcheck(torch.ops.ditfast.mlp_inference.default, (*args, "host"))


@pytest.mark.parametrize("kind", KINDS)
def test_inference_agrees_with_training(kind):
    args = inputs(kind, 3, 7, 48, 200, "cpu")
    trained = call(kind, "cpu", False)(*args, backend="host")
    with torch.no_grad():
        inferred = call(kind, "cpu", False)(*args, backend="host")
    assert torch.equal(trained, inferred) and not inferred.requires_grad


def test_compiles_fullgraph():
    compiled = torch.compile(lambda *a: ops.mlp(*a, backend="host"), fullgraph=True, backend="aot_eager")
    args = inputs("bf16", 2, 5, 16, 64, "cpu")
    assert torch.equal(compiled(*args), ops.mlp(*args, backend="host"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", ((1, 9), (0, 7), (700, 24), (65, 40)))
@pytest.mark.parametrize("spread", (0.01, 3.0, 30.0))
def test_jvp(rows, width, spread, dtype, isa, poisoned):
    """Compared with float64; the primal equals forward's. The tangent of a bias alone is expanded over the rows."""
    pre, full = problem(dtype, rows, width, spread)
    low, exact = reference(pre, full), reference(pre.double(), full.double())
    act, act_t = host.gelu_jvp(pre, full)
    assert torch.equal(act, host.gelu(pre))
    # elementwise, dpre is to dact what act_t is to pre_t
    assert_contract("act_t", act_t, low[1], exact[1], per_sample=False)
    row = full[:1].expand(rows, width)
    assert torch.equal(host.gelu_jvp(pre, row)[1], host.gelu_jvp(pre, row.contiguous())[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jvp_is_bit_equal_for_any_number_of_threads(dtype, with_threads):
    """Several tasks and a remainder."""
    pre, pre_t = problem(dtype, 700, 72)
    first, *others = (with_threads(n, host.gelu_jvp, pre, pre_t) for n in (1, 2, 7))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_jvp_propagates_non_finite_values(value, isa):
    for dtype in DTYPES:
        pre, pre_t = problem(dtype, 3, 40)
        pre_t[1, 39] = value
        act, act_t = host.gelu_jvp(pre, pre_t)
        bad = torch.zeros(3, 40, dtype=torch.bool)
        bad[1, 39] = True
        assert act.isfinite().all() and torch.equal(~act_t.isfinite(), bad)
