"""Attention and its tangent in one pass in C++ on the CPU, compared with float64."""

import re

import pytest
import torch
from attention_cases import NAN, far_logits, padded, parts, sample, token_major
from contract import assert_contract
from host.attention_calls import forward, geometry

from ditfast.ops import extension, reference

_C = pytest.importorskip("ditfast._C")

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 1, 3, 64),
    (3, 7, 1, 40),
    (2, 77, 3, 72),
    (1, 257, 2, 72),
    (2, 64, 2, 64),
    (1, 65, 1, 1),
    (1, 9, 1, 256),
    (1, 520, 1, 24),  # several blocks of keys
]
INF = float("inf")


def problem(*shape, dtype):
    """qkv, and a tangent from other samples."""
    return sample(*shape, dtype)[0], sample(*shape, dtype, seed=1)[0]


def exact_jvp(qkv, qkv_t, heads, scale, dtype):
    def function(t):
        return reference.attention(t, heads, scale)

    return torch.func.jvp(function, (qkv.to(dtype),), (qkv_t.to(dtype),))[1]


def assert_right(qkv, qkv_t, heads, scale=None):
    scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else scale
    out, lse, out_t = extension.host_jvp(qkv, qkv_t, heads, scale)
    assert all(map(torch.equal, (out, lse), forward(qkv, heads, scale=scale)))
    low, exact = (exact_jvp(qkv, qkv_t, heads, scale, dtype) for dtype in (qkv.dtype, torch.float64))
    assert_contract("out_t", out_t, low, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, isa, poisoned):
    assert_right(*problem(*shape, dtype=dtype), heads=shape[2])


@pytest.mark.parametrize(
    "shape, factor",
    (((2, 768, 2, 16), 0.03), ((2, 512, 1, 40), 0.1), ((1, 255, 4, 210), 10.0), ((1, 64, 2, 256), 8.0)),
    ids=str,
)
def test_long_sums(shape, factor, isa):
    """Values of one sign with nearly equal weights, and long rows with large logits: too long for a single sum."""
    qkv, qkv_t = problem(*shape, dtype=torch.float32)
    for t in (qkv, qkv_t):
        q, _, v = parts(t, shape[2])
        q *= factor
        v += 1.0
    scale = shape[3] ** -0.5
    low, exact = (reference.attention(qkv.to(t), shape[2], scale) for t in (torch.float32, torch.float64))
    assert_contract("out", forward(qkv, shape[2])[0], low, exact)
    assert_right(qkv, qkv_t, heads=shape[2])


@pytest.mark.parametrize("part", (0, 1, 2))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangent_of_one_part(part, dtype):
    qkv, qkv_t = problem(2, 77, 3, 24, dtype=dtype)
    for other in {0, 1, 2} - {part}:
        parts(qkv_t, 3)[other].zero_()
    assert_right(qkv, qkv_t, heads=3, scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (5, 300))
def test_tangents_of_logits_that_nearly_cancel(n, dtype):
    """The tangents of a query's logits share a large part, which contributes nothing."""
    qkv, qkv_t = problem(2, n, 1, 16, dtype=dtype)
    parts(qkv, 1)[1][..., 0] = 16.0
    parts(qkv_t, 1)[0][..., 0] = 16.0
    assert_right(qkv, qkv_t, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (65, 300))
def test_one_key_has_all_the_weight(n, dtype):
    """A key at the end: its weight moves the mean and cancels everything before it."""
    qkv, qkv_t = problem(2, n, 1, 16, dtype=dtype)
    q, k, _ = parts(qkv, 1)
    q[..., 0], k[..., 0] = 16.0, 0.0
    k[:, -3, :, 0] = 16.0
    assert_right(qkv, qkv_t, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_grow_from_block_to_block(dtype, isa):
    qkv, qkv_t = problem(1, 520, 1, 8, dtype=dtype)
    q, k, _ = parts(qkv, 1)
    q[..., 0], k[..., 0] = 8.0, torch.linspace(-2, 2, 520).view(1, 520, 1).to(dtype)
    assert_right(qkv, qkv_t, heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("n", [1, 63, 65])
def test_logits_of_large_magnitude(n, level, dtype, isa):
    qkv, _ = far_logits(2, n, 2, 16, dtype, level)
    qkv_t = sample(2, n, 2, 16, dtype, seed=1)[0]
    assert_right(qkv, qkv_t, heads=2, scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_one_token_out_is_v(dtype, isa):
    qkv, qkv_t = problem(3, 1, 2, 40, dtype=dtype)
    out_t = extension.host_jvp(qkv, qkv_t * 100, 2, 1.0)[2]
    assert torch.equal(out_t, (qkv_t * 100).chunk(3, dim=-1)[2])


def channel_major(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def first_sample(t):
    return t[:1].expand(t.shape)


def first_token(t):
    return t[:, :1].expand(t.shape)


def first_number(t):
    return t[:1, :1, :1].expand(t.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", (padded, token_major, channel_major, first_sample, first_token, first_number))
def test_strides(layout, dtype):
    qkv, qkv_t = problem(2, 77, 3, 40, dtype=dtype)
    moved = layout(qkv_t)
    assert moved.stride() != qkv_t.stride()
    expected = extension.host_jvp(qkv, moved.contiguous(), 3, 0.2)
    assert all(map(torch.equal, extension.host_jvp(qkv, moved, 3, 0.2), expected))
    expected = extension.host_jvp(layout(qkv).contiguous(), qkv_t, 3, 0.2)
    assert all(map(torch.equal, extension.host_jvp(layout(qkv), qkv_t, 3, 0.2), expected))


def test_misaligned_rows():
    """16-bit elements may start at any even address, and rows may have any stride."""
    qkv, qkv_t = problem(2, 33, 1, 24, dtype=torch.bfloat16)
    wide = torch.zeros(2, 33, 75, dtype=torch.bfloat16)
    wide[..., 1:73] = qkv_t
    results = (extension.host_jvp(qkv, t, 1, 0.2) for t in (wide[..., 1:73], qkv_t))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_for_any_number_of_threads_and_any_batch(dtype, with_threads):
    args = problem(3, 300, 3, 40, dtype=dtype)
    first, *others = (with_threads(n, extension.host_jvp, *args, 3, 0.2) for n in (1, 2, 5))
    for other in others:
        assert all(map(torch.equal, first, other))
    last = extension.host_jvp(*(t[2:] for t in args), 3, 0.2)
    assert all(map(torch.equal, last, (t[2:] for t in first)))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("token", [0, 70])
def test_non_finite_values_propagate(part, bad, token, isa):
    """NaN and infinity appear where plain float64 has them, in the same head only; a tangent's never in a primal."""
    for is_tangent in (False, True):
        qkv, qkv_t = problem(2, 77, 3, 16, dtype=torch.float32)
        (qkv_t if is_tangent else qkv).view(2, 77, 3, 3, 16)[1, token, part, 1, 4] = bad
        out, _, out_t = extension.host_jvp(qkv, qkv_t, 3, 0.25)
        exact = exact_jvp(qkv, qkv_t, 3, 0.25, torch.float64)
        assert not exact.isfinite().all()
        assert torch.equal(out_t.isfinite(), exact.isfinite())
        assert out.isfinite().all() or not is_tangent


@pytest.mark.parametrize("n, without", ((100, 70), (600, 300)))
def test_keys_of_logit_minus_infinity_have_no_weight(n, without, isa):
    """The first block of keys has only such logits, by overflow; their tangents are finite."""
    qkv, qkv_t = problem(1, n, 1, 8, dtype=torch.float32)
    q, k, _ = parts(qkv, 1)
    q[..., 0], k[..., 0] = 1e30, 0.0
    k[:, :without, 0] = -1e30
    for t in parts(qkv_t, 1)[:2]:
        t[..., 0] = 0.0
    out_t = extension.host_jvp(qkv, qkv_t, 1, 8**-0.5)[2]
    exact = exact_jvp(qkv, qkv_t, 1, 8**-0.5, torch.float64)
    torch.testing.assert_close(out_t.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7, 24), (2, 0, 24)])
def test_empty(shape):
    qkv = torch.empty(shape)
    out, lse, out_t = extension.host_jvp(qkv, torch.empty(shape), 1, 1.0)
    assert out.numel() == lse.numel() == out_t.numel() == 0 and out_t.shape == out.shape


BAD = [
    ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, got 'float64'"),
    ({"head_dim": 257}, "head_dim must be in 1..256, got 257"),
    ({"qkv_t_stride_b": -1}, "qkv_t_stride_b must be at least 0, got -1"),
    ({"qkv_t_stride_n": -1}, "qkv_t_stride_n must be at least 0, got -1"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
    ({"qkv": 0}, "qkv must be a pointer to a non-empty tensor, got null"),
    ({"qkv_t": 0}, "qkv_t must be a pointer to a non-empty tensor, got null"),
    ({"out_t": 0}, "out_t must be a pointer to a non-empty tensor, got null"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_call(change, message):
    qkv, qkv_t = problem(1, 3, 1, 4, dtype=torch.float32)
    out, lse = forward(qkv, 1)
    tensors = {"qkv": qkv, "qkv_t": qkv_t, "out": out, "lse": lse, "out_t": out.clone()}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    call = {**pointers, **geometry(qkv, 1), "qkv_t_stride_b": 36, "qkv_t_stride_n": 12, **change}
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        _C.attention_jvp_host(**call)
