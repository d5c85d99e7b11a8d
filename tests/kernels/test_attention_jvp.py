"""Attention and its tangent in one pass meet the numerical contract."""

import pytest
import torch
from attention_cases import far_logits, padded, parts, sample, token_major
from contract import assert_contract

pytest.importorskip("triton")

from ditfast.kernels import attention  # noqa: E402
from ditfast.kernels.attention_jvp import jvp  # noqa: E402
from ditfast.ops import reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 33, 2, 72), (3, 67, 1, 64), (2, 1, 1, 72))  # B, N, H, d: tiles of rows and keys, and remainders


def tangent(qkv, heads, only=("q", "k", "v")):
    """Values other than qkv's in the parts ``only``, zeros in the others."""
    b, n, _ = qkv.shape
    qkv_t, _ = sample(b, n, heads, qkv.shape[-1] // (3 * heads), qkv.dtype, seed=1, device=qkv.device)
    for name, part in zip("qkv", parts(qkv_t, heads), strict=True):
        if name not in only:
            part.zero_()
    return qkv_t


def exact(qkv, qkv_t, heads, scale=None, dtype=torch.float64):
    return torch.func.jvp(lambda t: reference.attention(t, heads, scale), (qkv.to(dtype),), (qkv_t.to(dtype),))


def assert_right(qkv, qkv_t, heads, scale=None):
    d = qkv.shape[-1] // (3 * heads)
    out, _, out_t = jvp(qkv, qkv_t, heads, d**-0.5 if scale is None else scale)
    low, ref = exact(qkv, qkv_t, heads, scale, qkv.dtype), exact(qkv, qkv_t, heads, scale)
    for name, got, lo, r in zip(("out", "out_t"), (out, out_t), low, ref, strict=True):
        assert_contract(name, got, lo, r)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(shape, dtype, device, poisoned):
    b, n, heads, d = shape
    qkv, _ = sample(b, n, heads, d, dtype, device=device)
    assert_right(qkv, tangent(qkv, heads), heads)


@pytest.mark.parametrize("only", "qkv")
def test_tangent_of_one_part(only, device, poisoned):
    qkv, _ = sample(2, 33, 1, 72, torch.float32, device=device)
    assert_right(qkv, tangent(qkv, 1, only), 1)


def test_scale(device):
    qkv, _ = sample(2, 33, 1, 64, torch.float32, device=device)
    assert_right(qkv, tangent(qkv, 1), 1, scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_primal_equals_forwards(dtype, device, poisoned):
    qkv, _ = sample(2, 33, 2, 72, dtype, device=device)
    out, lse, _ = jvp(qkv, tangent(qkv, 2), 2, 0.125)
    expected, expected_lse = attention.forward(qkv, 2, 0.125)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", (padded, token_major), ids=("padded", "token_major"))
def test_layouts(layout, device):
    """Results are bit-equal: primal and tangent have independent strides."""
    qkv, _ = sample(2, 33, 1, 72, torch.float16, device=device)
    qkv_t = tangent(qkv, 1)
    expected = jvp(qkv, qkv_t, 1, 0.125)
    for arguments in ((layout(qkv), qkv_t), (qkv, layout(qkv_t))):
        assert all(map(torch.equal, jvp(*arguments, 1, 0.125), expected))


def test_expanded_tangents(device):
    """Like the tangent of a bias alone: the same for all tokens and samples."""
    qkv, _ = sample(2, 33, 1, 72, torch.float16, device=device)
    qkv_t = tangent(qkv, 1)[:1, :1].expand(qkv.shape)
    expected = jvp(qkv, qkv_t.contiguous(), 1, 0.125)
    assert all(map(torch.equal, jvp(qkv, qkv_t, 1, 0.125), expected))


def test_very_negative_logits(device, poisoned):
    """All are near -1e4, so that a single leaked zero key would take all the weight."""
    qkv, _ = far_logits(2, 33, 2, 72, torch.float32, level=-1e4, device=device)
    out, _, out_t = jvp(qkv, tangent(qkv, 2, "v"), 2, 1.0)
    for got, ref in zip((out, out_t), exact(qkv, tangent(qkv, 2, "v"), 2, 1.0), strict=True):
        torch.testing.assert_close(got.double(), ref, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_shift_shared_by_all_keys_costs_no_precision(dtype, device):
    """A tangent of the keys' bias shifts all logits of a query equally; rounded weights must not carry it."""
    qkv, _ = sample(2, 65, 1, 64, dtype, device=device)
    qkv_t = (tangent(qkv, 1) * 4).round() / 4
    shifted = qkv_t.clone()
    parts(shifted, 1)[1].add_(16)  # still exact in bfloat16
    _, ref = exact(qkv, qkv_t, 1)
    plain, far = ((jvp(qkv, t, 1, 0.125)[2] - ref).norm() for t in (qkv_t, shifted))
    assert far <= 1.5 * plain


@pytest.mark.parametrize("where", (0, 1), ids=("primal", "tangent"))
def test_nan_in_a_key_propagates(where, device):
    qkv, _ = sample(2, 33, 2, 72, torch.float16, device=device)
    arguments = [qkv, tangent(qkv, 2)]
    parts(arguments[where], 2)[1][1, 32, 0, 5] = float("nan")
    out, _, out_t = jvp(*arguments, 2, 0.125)
    reached = (out, out_t) if where == 0 else (out_t,)
    for t in (out, out_t):
        of_heads = t.unflatten(-1, (2, 72))
        assert torch.isfinite(of_heads[0]).all() and torch.isfinite(of_heads[1, :, 1]).all()
        assert torch.isnan(of_heads[1, :, 0]).all() if any(t is r for r in reached) else torch.isfinite(t).all()


def test_no_samples(device):
    qkv = torch.empty(0, 5, 3 * 72, device=device)
    assert [t.shape for t in jvp(qkv, qkv, 1, 0.125)] == [(0, 5, 72), (0, 1, 5), (0, 5, 72)]
