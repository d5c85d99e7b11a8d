"""Attention in C++ on the CPU, compared with float64."""

import re
import threading
import time

import pytest
import torch
from attention_cases import NAN, far_logits, padded, reference, sample, token_major
from host.attention_calls import assert_right, forward, geometry, run, whole

from ditfast.ops import extension

_C = pytest.importorskip("ditfast._C")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 1, 3, 64),
    (3, 7, 1, 40),
    (2, 77, 3, 72),
    (1, 257, 2, 72),
    (2, 64, 2, 64),
    (1, 65, 1, 1),
    (1, 9, 1, 256),
    (1, 600, 1, 24),  # several blocks of keys and of queries
]
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, isa):
    assert_right(*sample(*shape, dtype), heads=shape[2])


def test_scale_is_used():
    assert_right(*sample(2, 33, 2, 24, torch.float32), heads=2, scale=0.7)


def channel_major(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [padded, token_major])
def test_strided_qkv(layout, dtype):
    qkv, dout = sample(2, 77, 3, 40, dtype)
    assert layout(qkv).stride() != qkv.stride()
    for got, expected in zip(run(layout(qkv), dout, 3), run(qkv, dout, 3), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize("layout", [padded, token_major, channel_major])
def test_strided_dout(layout):
    qkv, dout = sample(2, 77, 3, 40, torch.bfloat16)
    assert layout(dout).stride() != dout.stride()
    assert torch.equal(run(qkv, layout(dout), 3)[2], run(qkv, dout, 3)[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_tensors(dtype):
    """A sum's gradient has only zero strides; one sample may be expanded over the batch."""
    qkv, _ = sample(1, 77, 2, 40, dtype)
    qkv = qkv.expand(2, -1, -1)
    dout = torch.ones((), dtype=dtype).expand(2, 77, 80)
    assert_right(qkv, dout, heads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("n", [1, 63, 65])
def test_logits_of_large_magnitude(n, level, dtype, isa):
    """All logits are near -1e4, where a single leaked zero key would take all the weight, or near 1e4."""
    heads, d = 2, 16
    qkv, dout = far_logits(2, n, heads, d, dtype, level)
    assert_right(qkv, dout, heads, scale=1.0)


def every_16_bit_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def as_multiplied(values):
    """Flush subnormals to zero, as bfloat16 products of AVX512_BF16 do."""
    flushes = values.dtype == torch.bfloat16 and _C.isa().endswith("bf16")
    return values.where(values.abs() >= torch.finfo(torch.bfloat16).tiny, 0.0) if flushes else values


def with_values(v):
    """qkv (B, N, 3*H*d) of zero queries and keys, so that all weights are equal."""
    return torch.cat([torch.zeros_like(v), torch.zeros_like(v), v], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_value_passes_unchanged(dtype, isa):
    values = every_16_bit_value(dtype).view(1024, 1, 64)
    out, _ = forward(with_values(values), 1)
    assert torch.equal(out.isnan(), values.isnan())
    finite_or_inf = ~values.isnan()
    values = as_multiplied(values) + 0
    assert torch.equal(out[finite_or_inf].view(torch.int16), values[finite_or_inf].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_rounds_to_nearest_even(dtype, step, isa):
    """The mean of two adjacent numbers is a tie, even among subnormals."""
    values = every_16_bit_value(dtype)
    pairs = as_multiplied(torch.stack([values, values.roll(-step)], dim=1))  # (65536, 2)
    keep = (pairs.float().abs() < 1e38).all(dim=1) & (pairs[:, 0].sign() == pairs[:, 1].sign())
    pairs = pairs[keep].unsqueeze(-1)  # (B, 2, 1)
    expected = pairs.double().mean(dim=1).float().to(dtype)
    out, _ = forward(with_values(pairs), 1)
    assert len(pairs) > 60000
    assert torch.equal(out, expected.unsqueeze(1).expand_as(out))


def test_float16_gradients_overflow_to_infinity():
    qkv, dout = sample(1, 5, 1, 8, torch.float16)
    dout.fill_(30000.0)
    dv = run(qkv * 0, dout, 1)[2].chunk(3, dim=-1)[2]
    assert (dv == 30000.0).all()
    qkv.view(1, 5, 3, 8)[:, :, 0] = 8  # every query picks the first key
    qkv.view(1, 5, 3, 8)[:, :, 1] = -8
    qkv.view(1, 5, 3, 8)[:, 0, 1] = 8
    assert (run(qkv, dout, 1)[2].chunk(3, dim=-1)[2][:, 0] == INF).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("token", [0, 70])
def test_non_finite_values_propagate(part, bad, token, isa):
    """NaN and infinity appear where plain float64 has them, in the same head only."""
    qkv, dout = sample(2, 77, 3, 16, torch.float32)
    qkv.view(2, 77, 3, 3, 16)[1, token, part, 1, 4] = bad
    out, _, dqkv = run(qkv, dout, 3)
    exact_out, _, exact_dqkv, _ = reference(qkv, dout, 3, torch.float64, 16**-0.5)
    assert not exact_out.isfinite().all()
    assert torch.equal(out.isnan(), exact_out.isnan())
    assert torch.equal(out.isinf(), exact_out.isinf())
    assert torch.equal(dqkv.isfinite(), exact_dqkv.isfinite())


@pytest.mark.parametrize("n, without", ((100, 70), (600, 300)))
def test_keys_of_logit_minus_infinity_have_no_weight(n, without, isa):
    """The first block of keys has only such logits; the softmax over the rest is still finite."""
    qkv, _ = sample(1, n, 1, 8, torch.float32)
    q, k, _ = qkv.view(1, n, 3, 8).unbind(2)
    q[..., 0] = 1.0
    k[:, :without, 0] = -INF
    out, lse = forward(qkv, 1)
    exact_out, exact_lse, _, _ = reference(qkv, out, 1, torch.float64, 8**-0.5)
    torch.testing.assert_close(out.double(), exact_out, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole(lse, qkv.dtype), exact_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((3, 77, 3, 40), (1, 300, 1, 24)), ids=str)  # heads for all threads; a single head
def test_bit_equal_for_any_number_of_threads(shape, dtype):
    qkv, dout = sample(*shape, dtype)
    first = run(qkv, dout, shape[2], threads=1)
    for threads in [1, 2, 5, 64]:
        for got, expected in zip(run(qkv, dout, shape[2], threads=threads), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", (7, 40, 72))
def test_bias_gradient_is_the_sum_of_dqkv(d, dtype, isa):
    qkv, dout = sample(2, 77, 2, d, dtype)
    out, lse = extension.host_forward(qkv, 2, d**-0.5)
    dqkv, dbias = extension.host_backward(dout, qkv, out, lse, d**-0.5, torch.float32)
    assert torch.equal(dqkv, extension.host_backward(dout, qkv, out, lse, d**-0.5)[0])
    exact = dqkv.double().sum((0, 1))
    # dqkv is rounded to its dtype; in float32, the weights' own error is larger
    eps = max(torch.finfo(dtype).eps, 4e-6)
    tolerance = 2 * 154**0.5 * eps * dqkv.double().abs().max().item()
    torch.testing.assert_close(dbias.double(), exact, atol=tolerance, rtol=0)
    assert not dbias.chunk(3)[1].any()


def test_misaligned_rows():
    """16-bit elements may start at any even address, and rows may have any stride."""
    qkv, dout = sample(2, 33, 1, 24, torch.bfloat16)
    wide = torch.zeros(2, 33, 75, dtype=torch.bfloat16)
    wide[..., 1:73] = qkv
    for got, expected in zip(run(wide[..., 1:73], dout, 1), run(qkv, dout, 1), strict=True):
        assert torch.equal(got, expected)


def test_bit_equal_for_any_batch():
    qkv, dout = sample(3, 77, 2, 40, torch.float32)
    whole = run(qkv, dout, 2)
    for i in range(3):
        for got, expected in zip(run(qkv[i : i + 1], dout[i : i + 1], 2), whole, strict=True):
            assert torch.equal(got[0], expected[i])


def test_other_python_threads_keep_running():
    qkv, _ = sample(1, 1024, 8, 64, torch.float32)
    call = threading.Thread(target=lambda: forward(qkv, 8, threads=1))
    call.start()
    turns = 0
    while call.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10


@pytest.mark.parametrize("shape", [(0, 7, 24), (2, 0, 24)])
def test_empty(shape):
    """torch gives an empty tensor a null pointer."""
    qkv = torch.empty(shape)
    dout = torch.empty(*shape[:2], 8)
    assert qkv.data_ptr() == 0
    out, lse, dqkv = run(qkv, dout, 1)
    assert out.numel() == lse.numel() == dqkv.numel() == 0


BAD_IN_BOTH = [
    ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, got 'float64'"),
    ({"batch": -1}, "batch must be at least 0, got -1"),
    ({"tokens": -2}, "tokens must be at least 0, got -2"),
    ({"heads": -3}, "heads must be at least 0, got -3"),
    ({"head_dim": 0}, "head_dim must be in 1..256, got 0"),
    ({"head_dim": 257}, "head_dim must be in 1..256, got 257"),
    ({"stride_b": -1}, "stride_b must be at least 0, got -1"),
    ({"stride_n": -1}, "stride_n must be at least 0, got -1"),
    ({"scale": NAN}, "scale must be finite, got nan"),
    ({"scale": INF}, "scale must be finite, got inf"),
    ({"threads": 0}, "threads must be at least 1, got 0"),
    ({"qkv": 0}, "qkv must be a pointer to a non-empty tensor, got null"),
    ({"out": 0}, "out must be a pointer to a non-empty tensor, got null"),
    ({"lse": 0}, "lse must be a pointer to a non-empty tensor, got null"),
]
BAD_IN_BACKWARD = [
    ({"dout_stride_b": -1}, "dout_stride_b must be at least 0, got -1"),
    ({"dout_stride_n": -1}, "dout_stride_n must be at least 0, got -1"),
    ({"dout_stride_c": -1}, "dout_stride_c must be at least 0, got -1"),
    ({"dout": 0}, "dout must be a pointer to a non-empty tensor, got null"),
    ({"dqkv": 0}, "dqkv must be a pointer to a non-empty tensor, got null"),
]


def arguments(**changes):
    """A correct call of backward except for ``changes``, and the tensors it points to."""
    qkv, dout = sample(1, 3, 1, 4, torch.float32)
    out, lse = forward(qkv, 1)
    tensors = {"dout": dout, "qkv": qkv, "out": out, "lse": lse, "dqkv": torch.empty_like(qkv)}
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    strides = {"dout_stride_b": 12, "dout_stride_n": 4, "dout_stride_c": 1}
    return {**pointers, **strides, **geometry(qkv, 1), **changes}, tensors


def without_dout(call):
    return {name: value for name, value in call.items() if not name.startswith("d") or name == "dtype"}


@pytest.mark.parametrize(("change", "message"), BAD_IN_BOTH, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_forward_call(change, message):
    call, _tensors = arguments(**change)
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        _C.attention_forward_host(**without_dout(call))


@pytest.mark.parametrize(
    ("change", "message"), BAD_IN_BOTH + BAD_IN_BACKWARD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_backward_call(change, message):
    call, _tensors = arguments(**change)
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        _C.attention_backward_host(**call)


def test_arguments_are_passed_by_name():
    call, _tensors = arguments()
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.attention_backward_host(*call.values())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.attention_forward_host(**{**without_dout(call), "batch": 1.5})
