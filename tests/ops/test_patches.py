"""patchify, unpatchify and patch_embed: pure permutations, and a convolution."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from contract import compare, run

from ditfast import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((3, 4, 8, 8, 2), (1, 3, 6, 10, 2), (3, 4, 12, 4, 4), (1, 4, 8, 16, 8), (2, 1, 3, 5, 1))  # B, C, H, W, p
ORDERS = (False, True)  # channels_last


HOST = () if torch.cuda.is_available() or find_spec("ditfast._C") is None else ("host",)
BACKENDS = ("triton", *HOST, "reference")


def backends(op):
    return [pytest.param(op, name, id=f"{op}-{name}") for name in BACKENDS]


def everywhere(*names):
    return pytest.mark.parametrize(("op", "backend"), [case for name in names for case in backends(name)])


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(op, shape, channels_last, dtype=torch.float32):
    """Arguments of patchify or unpatchify for this image."""
    b, c, h, w, p = shape
    if op == "patchify":
        return randn(b, c, h, w, dtype=dtype), (p, channels_last)
    return randn(b, h // p * (w // p), c * p * p, dtype=dtype), (p, (h // p, w // p), channels_last)


def permuted(t):
    """The same values, dense, with dimensions in another memory order."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def by_hand(x, p, channels_last):
    """Patches in reading order; inside a patch, (c, ph, pw) or (ph, pw, c)."""
    b, _, h, w = x.shape
    patches = [x[:, :, i : i + p, j : j + p] for i in range(0, h, p) for j in range(0, w, p)]
    return torch.stack([(t.permute(0, 2, 3, 1) if channels_last else t).reshape(b, -1) for t in patches], 1)


@everywhere("patchify", "unpatchify")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", ORDERS)
def test_order(op, backend, shape, channels_last, poisoned, device):
    b, c, h, w, p = shape
    image = randn(b, c, h, w).to(device)
    tokens = by_hand(image, p, channels_last)
    if op == "patchify":
        assert torch.equal(ops.patchify(image, p, channels_last, backend=backend), tokens)
    else:
        assert torch.equal(ops.unpatchify(tokens, p, (h // p, w // p), channels_last, backend=backend), image)


@everywhere("patchify", "unpatchify")
def test_default_order(op, backend, device):
    """(c, ph, pw) as in a conv weight when cutting, (ph, pw, c) as in the original's final layer when joining."""
    image = randn(2, 3, 4, 4).to(device)
    if op == "patchify":
        assert torch.equal(ops.patchify(image, 2, backend=backend), by_hand(image, 2, False))
        assert torch.equal(ops.patchify(image, 2, backend=backend), F.unfold(image, 2, stride=2).mT)
    else:
        tokens = by_hand(image, 2, True)
        assert torch.equal(ops.unpatchify(tokens, 2, backend=backend), image)
        original = torch.einsum("nhwpqc->nchpwq", tokens.reshape(2, 2, 2, 2, 2, 3)).reshape(2, 3, 4, 4)
        assert torch.equal(ops.unpatchify(tokens, 2, backend=backend), original)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inverse(backend, shape, channels_last, dtype, device):
    b, c, h, w, p = shape
    image = randn(b, c, h, w, dtype=dtype).to(device)
    tokens = ops.patchify(image, p, channels_last, backend=backend)
    assert tokens.shape == (b, h // p * (w // p), c * p * p)
    assert torch.equal(ops.unpatchify(tokens, p, (h // p, w // p), channels_last, backend=backend), image)


@everywhere("patchify", "unpatchify")
@pytest.mark.parametrize("channels_last", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (permuted, torch.clone))
def test_gradient_is_the_inverse(op, backend, channels_last, dtype, layout, poisoned, device):
    """Exact in every dtype, since there are no sums. The gradient may have any strides."""
    t, rest = arguments(op, (3, 4, 6, 10, 2), channels_last, dtype)
    t = layout(t.to(device)).requires_grad_()
    out = getattr(ops, op)(t, *rest, backend=backend)
    dout = layout(randn(*out.shape, dtype=dtype, seed=1).to(device))
    (grad,) = torch.autograd.grad(out, t, dout)
    back = ops.unpatchify if op == "patchify" else ops.patchify
    grid = ((3, 5),) if op == "patchify" else ()
    assert torch.equal(grad, back(dout, 2, *grid, channels_last, backend="reference"))


@everywhere("patchify", "unpatchify")
def test_gradient_of_a_sum(op, backend, device):
    """It has only zero strides."""
    t, rest = arguments(op, (2, 4, 6, 10, 2), True)
    t = t.to(device).requires_grad_()
    (grad,) = torch.autograd.grad(getattr(ops, op)(t, *rest, backend=backend).sum(), t)
    assert torch.equal(grad, torch.ones_like(t))


def projection(shape, d, dtype=None, layout=torch.clone, device="cpu"):
    """x, weight, bias, pos_embed as leaves."""
    b, c, h, w, p = shape
    shapes = ((b, c, h, w), (d, c, p, p), (d,), (1, h // p * (w // p), d))
    spreads = (1.0, (c * p * p) ** -0.5, 0.5, 0.5)
    return [
        layout((randn(*s, seed=i) * k).to(device, dtype)).requires_grad_()
        for i, (s, k) in enumerate(zip(shapes, spreads, strict=True))
    ]


EMBED_NAMES = ("tokens", "dx", "dweight", "dbias", "dpos_embed")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flat", (False, True), ids=("1ND", "ND"))
def test_patch_embed_is_a_convolution(backend, flat, device):
    x, weight, bias, pos = projection((3, 4, 6, 10, 2), 24, device=device)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride=2).flatten(2).mT + pos
    got = ops.patch_embed(x, weight, bias, pos[0] if flat else pos, 2, backend=backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    by_patches = ops.patchify(x, 2) @ weight.flatten(1).T + bias + pos
    torch.testing.assert_close(got, by_patches, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("triton",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", (torch.clone, permuted))
def test_patch_embed_meets_the_contract(backend, dtype, shape, layout, poisoned, device):
    b, c, h, w, p = shape
    dout = layout(randn(b, h // p * (w // p), 40, dtype=dtype, seed=9).to(device))

    def inputs(exact):
        # the exact reference reads values rounded to the tested dtype
        values = projection(shape, 40, dtype, layout, device)
        return [t.detach().to(exact or dtype).requires_grad_() for t in values]

    compare(
        lambda *a, backend: ops.patch_embed(*a, p, backend=backend),
        inputs,
        names=EMBED_NAMES,
        parameters=EMBED_NAMES[2:],
        weights=[dout],
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_patch_embed_of_a_sum_and_of_frozen_weights(backend, device):
    results = []
    for name in (backend, "reference"):
        x, weight, bias, pos = projection((3, 4, 6, 10, 2), 24, device=device)
        out = ops.patch_embed(x.detach(), weight, bias.detach(), pos, 2, backend=name)
        results.append(torch.autograd.grad(out.sum(), (weight, pos)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patch_embed_under_autocast(backend, device):
    """The projection is in bfloat16, the stream in the dtype of pos_embed, gradients in the leaves' dtypes."""
    args = projection((3, 4, 6, 10, 2), 24, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.patch_embed(*args, 2, backend=backend)
    assert out.dtype == torch.float32
    exact = ops.patch_embed(*args, 2, backend="reference")
    torch.testing.assert_close(out, exact, rtol=0.02, atol=0.02)
    grads = (torch.autograd.grad(o.square().sum(), args) for o in (out, exact))
    for name, a, b in zip(EMBED_NAMES[1:], *grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item(), msg=name)


@everywhere("patchify", "unpatchify", "patch_embed")
def test_empty_batch(op, backend, device):
    if op == "patch_embed":
        t, *rest = projection((0, 4, 6, 10, 2), 24, device=device)
        rest.append(2)
    else:
        t, rest = arguments(op, (0, 4, 6, 10, 2), True)
        t = t.to(device).requires_grad_()
    out = getattr(ops, op)(t, *rest, backend=backend)
    assert out.numel() == 0
    (grad,) = torch.autograd.grad(out.sum(), t)
    assert grad.shape == t.shape


@everywhere("patchify", "unpatchify", "patch_embed")
def test_compiles_fullgraph(op, backend, device):
    """Forward and backward inside torch.compile equal eager, even as B and the grid change."""

    def fn(*tensors, grid):
        if op == "patch_embed":
            return ops.patch_embed(*tensors, 2, backend=backend)
        rest = (2, True) if op == "patchify" else (2, grid, True)
        return getattr(ops, op)(*tensors, *rest, backend=backend)

    torch._dynamo.reset()  # all parametrizations share one code object, which may be compiled only eight times
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for b, h, w in ((2, 4, 6), (3, 8, 6), (4, 6, 10)):
        shape = (b, 4, h, w, 2)
        if op == "patch_embed":
            tensors = projection(shape, 24, device=device)
        else:
            tensors = [arguments(op, shape, True)[0].to(device).requires_grad_()]
        grid = (h // 2, w // 2)
        dout = randn(*fn(*tensors, grid=grid).shape, seed=9).to(device)
        graph, eager = (run(lambda *a, f=f, grid=grid: f(*a, grid=grid), tensors, [dout]) for f in (compiled, fn))
        for a, b in zip(graph, eager, strict=True):
            torch.testing.assert_close(a, b)


REGISTERED = [op for op in ("patchify", "unpatchify", "patch_embed") if hasattr(torch.ops.ditfast, op)]


@pytest.mark.parametrize("op", REGISTERED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", (True, False))
@pytest.mark.parametrize("layout", (torch.clone, permuted))
def test_opcheck(op, dtype, requires_grad, layout):
    if op == "patch_embed":
        x, weight, bias, pos = (t.detach() for t in projection((2, 4, 4, 6, 2), 24, dtype))
        values = [layout(t) for t in (x, weight.flatten(1), bias, pos[0])]
        rest = (2, dtype, "triton")
    else:
        t, rest = arguments(op, (2, 4, 4, 6, 2), True, dtype)
        values = [layout(t)]
        rest = (2, True, "triton") if op == "patchify" else (2, 2, 3, True, "triton")
    values = [t.requires_grad_(requires_grad) for t in values]
    torch.library.opcheck(getattr(torch.ops.ditfast, op).default, (*values, *rest))
