"""The qkv Linear and attention in one autograd node meet the numerical contract."""

import contextlib

import pytest
import torch
from contract import run
from torch.utils.checkpoint import checkpoint

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.log import record
from ditfast.ops.contract import errors

# the interpreter computes with numpy, which warns where a GPU does not
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BACKENDS = [name for name in ops.QKV_ATTENTION.kernels if why_not(ops.QKV_ATTENTION, name, "cpu") is None]
NAMES = ("out", "dh", "dweight", "dbias")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "mixed": torch.float32}
SHAPES = ((3, 65, 1, 64, 24), (2, 33, 3, 72, 40), (1, 9, 2, 72, 8), (2, 130, 1, 72, 16))  # B, N, H, d, D
SMALL = (2, 9, 2, 72, 16)


def inputs(kind, shape, dtype=None):
    """h, weight, bias; every sample has its own scale. mixed: float32 weights under autocast."""
    b, n, heads, d, width = shape
    g = torch.Generator().manual_seed(3)
    h = torch.randn(b, n, width, generator=g) * torch.linspace(2, 1, b).view(b, 1, 1)
    weight, bias = (torch.randn(3 * heads * d, *s, generator=g) * 0.5 for s in ((width,), ()))
    values = [(t * k).to(DTYPES[kind]) for t, k in ((h, 1), (weight, 2 * width**-0.5), (bias, 1))]
    if kind == "mixed" and dtype is None:  # h has the autocast dtype
        values[0] = values[0].bfloat16()
    return [t.to(dtype or t.dtype).requires_grad_() for t in values]


def call(kind, heads, **options):
    def fn(*args):
        on = torch.autocast("cpu", torch.bfloat16) if kind == "mixed" else contextlib.nullcontext()
        with on:
            return ops.qkv_attention(*args, heads, **options)

    return fn


def gradient(kind, shape):
    b, n, heads, d, _ = shape
    dtype = torch.bfloat16 if kind == "mixed" else DTYPES[kind]
    return torch.randn(b, n, heads * d, generator=torch.Generator().manual_seed(4)).to(dtype)


def results(kind, shape, backend, dtype=None, **options):
    dout = gradient(kind, shape)
    args = inputs(kind, shape, dtype)
    return run(call(kind, shape[2], backend=backend, **options), args, [dout if dtype is None else dout.double()])


def weight_error(shape, scale):
    """The error of a weight recomputed in backward, due to float32 logits and log-sum-exp."""
    h, weight, bias = inputs("fp32", shape, torch.float64)
    q, k, _ = torch.nn.functional.linear(h, weight, bias).unflatten(-1, (3, shape[2], -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * scale
    return 2 * torch.finfo(torch.float32).eps * max(logits.abs().max(), logits.logsumexp(-1).abs().max()).item()


def named(kind, found):
    """The results by name; the nonzero parts of the bias's gradient separately."""
    dq, dk, dv = found[3].chunk(3)
    return dict(zip(NAMES, found, strict=True)) | {"dbias of q": dq, "dbias of v": dv}


def assert_right(kind, shape, backend, **options):
    got, low, ref = (
        named(kind, results(kind, shape, *args, **options))
        for args in ((backend,), ("reference",), ("reference", torch.float64))
    )
    extra = weight_error(shape, options.get("scale", shape[3] ** -0.5))
    for name, g in got.items():
        assert g.dtype == low[name].dtype and torch.isfinite(g).all(), name
        size = ref[name].abs().max().item()
        for rule, error, limit in errors(g, low[name], ref[name], per_sample=name in ("out", "dh")):
            slack = extra * (size if rule == "max error" else 1)
            assert error <= limit + slack, f"{name}: {rule}: {error:.3g} > {limit + slack:.3g}"
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(shape, kind, backend, poisoned):
    with record() as ran:
        got = assert_right(kind, shape, backend)
    assert ran["qkv_attention"] == [backend] * 2, "forward and backward of the fused node"
    assert got["dbias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, poisoned):
    assert_right("fp32", SMALL, backend, scale=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token(backend, poisoned):
    """The output is v whatever q and k are, so their gradients are zero, and dv is the output's, up to rounding."""
    shape = (2, 1, 2, 72, 8)
    dq, dk, dv = results("fp32", shape, backend)[3].chunk(3)
    torch.testing.assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-4)
    torch.testing.assert_close(dv, gradient("fp32", shape).sum((0, 1)))
    assert torch.equal(dk, torch.zeros_like(dk))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_the_keys_has_no_gradient(backend):
    """It shifts all logits of a query equally. PyTorch's sum of dk is rounding noise, the kernels' exactly zero."""
    shape = SMALL
    dk = results("bf16", shape, backend)[3].chunk(3)[1]
    exact = results("bf16", shape, "reference", torch.float64)[3].chunk(3)[1]
    assert torch.equal(dk, torch.zeros_like(dk)) and exact.abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("fp32", "bf16"))
def test_it_is_the_linear_and_attention(kind, backend):
    """Bit-equal, and saving the same for backward; under no_grad or without a bias, it is just these two."""
    b, n, heads, d, width = shape = SMALL
    args = inputs(kind, shape)

    def apart(h, weight, bias):
        return ops.attention(torch.nn.functional.linear(h, weight, bias), heads, backend=backend)

    def kept(fn):
        sizes = {}
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t), lambda t: t)
        with keep:
            out = fn(*args)
        return out, sorted(t.nbytes for t in sizes.values())

    (out, bytes_kept), (expected, expected_bytes) = kept(call(kind, heads, backend=backend)), kept(apart)
    assert torch.equal(out, expected) and bytes_kept == expected_bytes
    with torch.no_grad(), record() as ran:
        assert torch.equal(ops.qkv_attention(*args, heads, backend=backend), expected)
    assert ran == {"attention": [backend]}


@pytest.mark.parametrize("backend", (*BACKENDS, "reference", "sdpa"))
def test_without_a_bias(backend):
    shape, heads = SMALL, SMALL[2]
    grads = []
    for fn in (
        lambda h, w: ops.qkv_attention(h, w, None, heads, backend=backend),
        lambda h, w: ops.attention(h @ w.T, heads, backend="reference"),
    ):
        h, w, _ = inputs("fp32", shape)
        out = fn(h, w)
        grads.append((out, *torch.autograd.grad(out, (h, w), gradient("fp32", shape))))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ((0,), (1,), (2,), (0, 2), (1, 2)), ids=str)
def test_frozen_arguments_get_no_gradient(wanted, backend, monkeypatch):
    """Nor is one computed: with a frozen bias, the fused node has nothing to do."""
    grads, heads = [], SMALL[2]
    for name in (backend, "reference"):
        args = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs("fp32", SMALL))]
        with record() as ran:
            out = ops.qkv_attention(*args, heads, backend=name)
            grads.append(torch.autograd.grad(out, [args[i] for i in wanted], gradient("fp32", SMALL)))
        assert ("qkv_attention" in ran) == (2 in wanted and name != "reference")
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_unneeded_products_are_not_computed():
    from torch.utils.flop_counter import FlopCounterMode

    heads, flops = SMALL[2], {}
    for wanted in ((2,), (0, 2), (1, 2), (0, 1, 2)):
        args = [t.requires_grad_(i in wanted) for i, t in enumerate(inputs("fp32", SMALL))]
        out = ops.qkv_attention(*args, heads, backend="triton")
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(out, [args[i] for i in wanted], gradient("fp32", SMALL))
        flops[wanted] = counter.get_total_flops()
    b, n, heads, d, width = SMALL
    product = 2 * b * n * width * 3 * heads * d
    assert flops[0, 2] == flops[1, 2] == flops[2,] + product and flops[0, 1, 2] == flops[2,] + 2 * product


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_sum(backend, poisoned):
    """It has only zero strides."""
    grads = []
    for name in (backend, "reference"):
        args = inputs("fp32", SMALL)
        grads.append(torch.autograd.grad(ops.qkv_attention(*args, 2, backend=name).sum(), args))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout_of_h(backend):
    args = inputs("fp32", SMALL)
    expected = run(call("fp32", 2, backend=backend), args, [gradient("fp32", SMALL)])
    for layout in (lambda t: t.mT.contiguous().mT, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        other = [layout(args[0].detach()).requires_grad_(), *args[1:]]
        got = run(call("fp32", 2, backend=backend), other, [layout(gradient("fp32", SMALL))])
        for name, a, b in zip(NAMES, got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("fp32", "mixed"))
def test_compiles_fullgraph(kind, backend):
    """Forward and backward inside torch.compile equal eager, even as N and B change."""
    fn = call(kind, 1, backend=backend)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for b, n in ((2, 5), (3, 7)):
        shape = (b, n, 1, 64, 16)
        eager, graph = (run(f, inputs(kind, shape), [gradient(kind, shape)]) for f in (fn, compiled))
        for name, a, e in zip(NAMES, graph, eager, strict=True):
            assert torch.equal(a, e), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint(backend):
    fn = call("fp32", 2, backend=backend)
    plain, again = (
        run(f, inputs("fp32", SMALL), [gradient("fp32", SMALL)])
        for f in (fn, lambda *args: checkpoint(fn, *args, use_reentrant=False))
    )
    for name, a, b in zip(NAMES, again, plain, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_bit_equal(backend):
    for name, a, b in zip(NAMES, *(results("bf16", SMALL, backend) for _ in range(2)), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_empty_batch(backend, poisoned):
    args = inputs("fp32", (0, 5, 2, 64, 16))
    out = ops.qkv_attention(*args, 2, backend=backend)
    grads = torch.autograd.grad(out.sum(), args)
    assert out.shape == (0, 5, 128)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(grads, args, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates(backend):
    args = inputs("fp32", SMALL)
    with torch.no_grad():
        args[0][1, 2, 3] = float("nan")
    out = ops.qkv_attention(*args, 2, backend=backend)
    dh, dweight, dbias = torch.autograd.grad(out.sum(), args)
    assert torch.isnan(out[1]).any() and torch.isfinite(out[0]).all()
    assert torch.isnan(dh[1]).any() and torch.isfinite(dh[0]).all()
    assert torch.isnan(dweight).any() and torch.isnan(dbias.chunk(3)[0]).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("fp32", "fp16", "bf16"))
@pytest.mark.parametrize("requires_grad", (True, False))
def test_opcheck(backend, kind, requires_grad):
    args = [t.requires_grad_(requires_grad) for t in inputs(kind, (2, 5, 2, 64, 16))]
    torch.library.opcheck(torch.ops.ditfast.qkv_attention.default, (*args, 2, 0.125, backend))


def test_named_backend_that_cannot_run():
    h, weight, bias = inputs("fp32", (2, 5, 2, 40, 16))
    with pytest.raises(
        RuntimeError, match="qkv_attention: backend 'triton' cannot run: it supports head dims 64 and"
    ):
        ops.qkv_attention(h, weight, bias, 2, backend="triton")
    with pytest.raises(
        ValueError, match="backend of qkv_attention must be one of auto, cuda, triton, sdpa, host, ref"
    ):
        ops.qkv_attention(h, weight, bias, 2, backend="nothing")
