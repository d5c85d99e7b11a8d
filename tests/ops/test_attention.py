"""attention meets the numerical contract on each of its backends."""

import contextlib

import pytest
import torch
from contract import run

from ditfast import ops
from ditfast.ops.backends.availability import why_not
from ditfast.ops.contract import errors

BACKENDS = [
    name for name in ops.ATTENTION.backends if name != "reference" and why_not(ops.ATTENTION, name, "cpu") is None
]
HEAD_DIMS = {"triton": (64, 72), "cuda": (64, 72)}  # the others support any
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((3, 65, 1, 64), (2, 33, 2, 72), (1, 65, 2, 40), (1, 7, 1, 8))  # B, N, H, d
NAMES = ("out", "dq", "dk", "dv")


def dense(t):
    return t


def padded(t):
    """The same values in longer rows, padded with NaN."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 8), float("nan"), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def token_major(t):
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def channel_major(t):
    return t.mT.contiguous().mT


LAYOUTS = (dense, padded, token_major, channel_major)


def sample(shape, dtype, seed=0):
    """qkv and a gradient of the output; every sample has its own scale."""
    b, n, heads, d = shape
    g = torch.Generator().manual_seed(seed)
    scales = torch.linspace(2, 1, b).view(b, 1, 1)
    qkv, dout = (torch.randn(b, n, k * heads * d, generator=g) * scales for k in (3, 1))
    return qkv.to(dtype), dout.to(dtype)


def results(qkv, dout, heads, backend, **options):
    """The output and the three parts of the gradient."""
    qkv = qkv.detach().requires_grad_()  # detach keeps the strides
    out, dqkv = run(lambda t: ops.attention(t, heads, backend=backend, **options), [qkv], [dout])
    return [out, *dqkv.chunk(3, dim=-1)]


def weight_error(qkv, heads, scale):
    """The relative error of a weight exp(logit - lse) due to float32 logits and log-sum-exp.

    Kernels that recompute weights have it; PyTorch's plain softmax, which divides by its own sum, does not.
    """
    q, k, _ = qkv.double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    return 2 * torch.finfo(torch.float32).eps * max(logits.abs().max(), logits.logsumexp(-1).abs().max()).item()


def assert_right(qkv, dout, heads, backend, scale=None):
    got = results(qkv, dout, heads, backend, scale=scale)
    low = results(qkv, dout, heads, "reference", scale=scale)
    exact = results(qkv.double(), dout.double(), heads, "reference", scale=scale)
    extra = weight_error(qkv, heads, scale)
    for name, g, lo, ref in zip(NAMES, got, low, exact, strict=True):
        assert g.dtype == lo.dtype and torch.isfinite(g).all(), name
        for kind, error, limit in errors(g, lo, ref):
            size = ref.abs().max().item() if kind == "max error" else 1
            assert error <= limit + extra * size, f"{name}: {kind}: {error:.3g} > {limit:.3g}"


CASES = [(name, shape) for name in BACKENDS for shape in SHAPES if shape[3] in HEAD_DIMS.get(name, shape)]


@pytest.mark.parametrize(("backend", "shape"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(shape, dtype, backend, poisoned):
    assert_right(*sample(shape, dtype), shape[2], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_attends_to_itself(dtype, backend, poisoned):
    qkv, dout = sample((2, 1, 2, 64), dtype)
    out, dq, dk, dv = results(qkv, dout, 2, backend)
    assert torch.equal(out, qkv.chunk(3, dim=-1)[2]) and torch.equal(dv, dout)
    for t in (dq, dk):
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    qkv, dout = sample((2, 33, 2, 64), torch.float32)
    assert_right(qkv, dout, 2, backend, scale=0.3)
    default, same, other = (
        ops.attention(qkv, 2, scale, backend=backend) for scale in (None, 64**-0.5, 0.3)
    )  # fmt: skip
    assert torch.equal(default, same) and not torch.allclose(default, other)


def test_the_reference_equals_pytorchs():
    """Compared with PyTorch's in float64: q, k and v follow each other, each with its heads side by side."""
    qkv, dout = sample((2, 33, 3, 40), torch.float64)
    for a, b in zip(*(results(qkv, dout, 3, name) for name in ("reference", "sdpa")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout(layout, backend):
    qkv, dout = sample((2, 33, 3, 72), torch.float32)
    assert layout(qkv).stride() != qkv.stride()
    expected = results(qkv, dout, 3, backend)
    for got in (results(layout(qkv), dout, 3, backend), results(qkv, layout(dout), 3, backend)):
        for name, a, b in zip(NAMES, got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_sum(dtype, backend, poisoned):
    """It has only zero strides."""
    qkv, _ = sample((2, 33, 2, 72), dtype)
    assert_right(qkv, torch.ones((), dtype=dtype).expand(2, 33, 144), 2, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (63, 65))
def test_very_negative_logits(n, dtype, backend):
    """All are near -1e4, so that a single leaked zero key would take all the weight."""
    qkv, dout = sample((2, n, 2, 72), dtype)
    q, k, _ = qkv.view(2, n, 3, 2, 72).unbind(2)
    q[..., 0], k[..., 0] = 128.0, -1e4 / 128.0
    assert_right(qkv, dout, 2, backend, scale=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("plain", "autocast"))
def test_compiles_fullgraph(backend, kind):
    """Forward and backward inside torch.compile equal eager, even as N and B change."""

    def attend(qkv):
        with autocast(kind):
            return ops.attention(qkv, 2, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for b, n in ((2, 5), (3, 7), (4, 6)):
        qkv, dout = sample((b, n, 2, 64), torch.bfloat16 if kind == "autocast" else torch.float32)
        qkv = padded(qkv)
        for name, a, e in zip(
            ("out", "dqkv"),
            *(run(f, [qkv.detach().requires_grad_()], [dout]) for f in (compiled, attend)),
            strict=True,
        ):
            torch.testing.assert_close(a, e, msg=name)


def autocast(kind):
    return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast(backend):
    """The qkv Linear returns the autocast dtype, attention keeps it, and backward runs outside autocast."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 3 * 2 * 64), torch.randn(2, 9, 24)

    def grad(name):
        with autocast("autocast"):
            qkv = linear(x)
            out = ops.attention(qkv, 2, backend=name)
        assert qkv.dtype == out.dtype == torch.bfloat16
        return out, *torch.autograd.grad(out.float().square().sum(), tuple(linear.parameters()))

    for a, b in zip(grad(backend), grad("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * b.abs().max().item())


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_empty_batch(backend):
    qkv = torch.zeros(0, 5, 3 * 2 * 64, requires_grad=True)
    out = ops.attention(qkv, 2, backend=backend)
    assert out.shape == (0, 5, 2 * 64)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert dqkv.shape == qkv.shape


@pytest.mark.parametrize("backend", [name for name in (*BACKENDS, "reference") if name != "sdpa"])
def test_nan_stays_in_its_sample(backend):
    """PyTorch's own attention on the CPU returns zeros for a row of NaN logits."""
    qkv, _ = sample((3, 5, 2, 64), torch.float32)
    qkv[1, 2, 3] = float("nan")
    out = ops.attention(qkv, 2, backend=backend)
    assert torch.isnan(out[1]).any() and torch.isfinite(out[0]).all() and torch.isfinite(out[2]).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", (True, False))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, dtype, requires_grad, layout):
    qkv = layout(sample((2, 5, 2, 64), dtype)[0]).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.ditfast.attention.default, (qkv, 2, 0.125, backend))
