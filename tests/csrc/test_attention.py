"""The CUDA attention kernels, run in an emulator."""

from dataclasses import replace

import emulator as emulation
import pytest
import torch
from attention_cases import NAN, assert_right, far_logits, padded, parts, probe_inputs, sample, token_major

from harness.aot.gpus import GPUS

DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 72]
REGISTERS = (128, 168)  # per thread, forward and backward: test_attention_build.py
H100 = GPUS["H100"]
A100, A10 = replace(H100, shared=164 * 1024), replace(H100, shared=100 * 1024, warps=48, blocks=16)
pytestmark = pytest.mark.skipif(not emulation.available(), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def emulator():
    return emulation.Emulator(emulation.compile_emulator())


def shape(b, n, heads, d=72):
    """A qkv that has only a shape."""
    return torch.empty(1, n, 3 * heads * d, dtype=torch.bfloat16).expand(b, -1, -1)


def assert_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 63, 64, 77, 256, 257])
def test_contract(emulator, n, d, dtype):
    b, heads = (2, 3) if n < 100 else (1, 1)
    qkv, dout = sample(b, n, heads, d, dtype)
    results = emulator.run(padded(qkv), padded(dout), heads)
    assert_right(results, qkv, dout, heads)
    assert_equal(emulator.run(padded(qkv), padded(dout), heads, multiprocessors=1), results)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [65, 128, 129, 193, 200, 320])
def test_more_lengths(emulator, n, d):
    qkv, dout = sample(1, n, 1, d, torch.bfloat16)
    assert_right(emulator.run(qkv, dout, 1), qkv, dout, 1)


@pytest.mark.parametrize("n", [77, 256])
def test_bit_equal_however_the_rows_are_split(emulator, n):
    """One block per head, or one per group of rows; alone or in a batch; in any layout."""
    qkv, dout = sample(2, n, 1, 72, torch.bfloat16)
    results = emulator.run(qkv, dout, 1)
    assert emulator.plan(qkv, 1, 1)[:2] == [8, 1]
    assert emulator.plan(qkv, 1, 132)[:2] == [4, -(-n // 64)]
    assert emulator.plan(qkv, 1, 132, backward=True)[1] > 1
    assert_equal(emulator.run(qkv, dout, 1, multiprocessors=1), results)
    assert_equal(emulator.run(token_major(qkv), token_major(dout), 1), results)
    assert_equal(emulator.run(qkv[1:], dout[1:], 1), [t[1:] for t in results])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("n", [1, 63, 65, 257])
def test_logits_of_large_magnitude(emulator, n, level, dtype):
    qkv, dout = far_logits(1, n, 1, 72, dtype, level)
    assert_right(emulator.run(qkv, dout, 1, scale=1.0), qkv, dout, 1, scale=1.0)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_equal_rows(emulator, d):
    qkv, dout = sample(1, 77, 2, d, torch.float16)
    qkv = qkv[:, :1].expand(-1, 77, -1)
    out, *rest = emulator.run(qkv, dout, 2)
    assert_right((out, *rest), qkv, dout, 2)
    torch.testing.assert_close(out, qkv.chunk(3, dim=-1)[2], atol=0, rtol=1e-3)


@pytest.mark.parametrize("key", [0, 70, 256])
def test_one_huge_key(emulator, key):
    """It takes all the weight of the queries that point its way, and none of the others'."""
    qkv, dout = sample(1, 257, 1, 64, torch.bfloat16)
    parts(qkv, 1)[1][:, key] *= 100
    assert_right(emulator.run(qkv, dout, 1), qkv, dout, 1)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 77, 257])
def test_neighbours_do_not_matter(emulator, n, d):
    """The heads and samples around one head are NaN, which would spread even through 0 * NaN."""
    qkv, dout = sample(1, n, 1, d, torch.bfloat16)
    expected = emulator.run(qkv, dout, 1)
    many_qkv = torch.full((3, n, 9 * d), NAN, dtype=qkv.dtype)
    many_dout = torch.full((3, n, 3 * d), NAN, dtype=qkv.dtype)
    many_qkv.view(3, n, 3, 3, d)[1, :, :, 1] = qkv.view(n, 3, d)
    many_dout.view(3, n, 3, d)[1, :, 1] = dout[0]
    out, lse, dqkv, dbias = emulator.run(many_qkv, many_dout, 3)
    assert torch.equal(out.view(3, n, 3, d)[1, :, 1], expected[0][0])
    assert torch.equal(lse[1, 1], expected[1][0, 0])
    assert torch.equal(dqkv.view(3, n, 3, 3, d)[1, :, :, 1].reshape(1, n, 3 * d), expected[2])
    assert torch.equal(dbias.view(3, -1, 3, 3, d)[1, :, :, 1].reshape(1, -1, 3 * d), expected[3])


def test_non_finite_values_propagate(emulator):
    qkv, dout = sample(1, 77, 1, 72, torch.bfloat16)
    parts(qkv, 1)[2][0, 70, 0, 5] = NAN
    out, _, dqkv, dbias = emulator.run(qkv, dout, 1)
    assert out[..., 5].isnan().all() and not out[..., 6].isnan().any()
    assert dqkv[0, 70, 72:144].isnan().all() and dbias[..., :72].isnan().any()


@pytest.mark.parametrize("n", [1, 257])
def test_without_a_gradient_of_the_bias(emulator, n):
    """dqkv is the same, and no dbias is written."""
    qkv, dout = sample(2, n, 1, 72, torch.bfloat16)
    out, lse, dqkv, _ = emulator.run(qkv, dout, 1)
    assert torch.equal(emulator.backward(dout, qkv, out, lse, 1, bias=False)[0], dqkv)


def test_rows_of_the_gradient_of_the_bias(emulator):
    """One per 64 tokens of a short sample, per 96 of a longer one."""
    groups = {1: 1, 64: 1, 65: 2, 128: 2, 129: 2, 192: 2, 193: 3, 256: 3, 4096: 43}
    assert {n: emulator.library.groups(n) for n in groups} == groups
    qkv, dout = sample(1, 200, 2, 64, torch.float16)
    dbias = emulator.run(qkv, dout, 2)[3]
    for i, rows in enumerate(dout[0].double().split(96)):
        torch.testing.assert_close(dbias[0, i, 256:].double(), rows.sum(0), atol=1e-5, rtol=1e-5)


def test_keys_of_logit_minus_infinity_have_no_weight(emulator):
    """The first tile of keys has only such logits; the softmax over the rest is still finite."""
    qkv, _ = sample(1, 100, 1, 64, torch.bfloat16)
    rest = qkv.clone()
    q, k, _ = parts(qkv, 1)
    q[..., 0] = 1.0
    k[:, :70, :, 0] = -float("inf")
    parts(rest, 1)[0][..., 0] = 1.0
    out, lse = emulator.forward(qkv, 1)
    q, k, v = (t[0, :, 0].double() for t in parts(rest, 1))
    logits = q @ k[70:].T / 8
    torch.testing.assert_close(out[0].double(), logits.softmax(-1) @ v[70:], atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(lse[0, 0].double(), logits.logsumexp(-1), atol=1e-5, rtol=2e-6)


def test_expanded_tensors(emulator):
    """One sample for the whole batch, and one gradient for every token: strides of zero."""
    qkv, dout = sample(1, 70, 2, 72, torch.float16)
    qkv, dout = qkv.expand(2, -1, -1), dout[:, :1].expand(2, 70, -1)
    assert_right(emulator.run(qkv, dout, 2, scale=0.3), qkv, dout, 2, scale=0.3)


def test_plan(emulator):
    def plan(b, n, heads, backward=False, multiprocessors=132):
        return emulator.plan(shape(b, n, heads), heads, multiprocessors, backward)

    assert plan(64, 256, 16) == [8, 1, 1024, 73728]
    assert plan(64, 256, 16, backward=True) == [6, 1, 2048, 77184]
    assert plan(2, 256, 16) == [4, 4, 128, 73728]
    assert plan(2, 256, 16, multiprocessors=108) == [8, 2, 64, 73728], "128 blocks would be too many"
    assert plan(2, 1024, 3, multiprocessors=96) == [4, 16, 96, 55296]
    assert plan(256, 64, 16) == [4, 1, 4096, 18432]
    assert plan(16, 4096, 16) == [8, 32, 8192, 55296]
    assert plan(70000, 1, 2)[2] == 140000, "more heads than a grid has blocks in y or z"


@pytest.mark.parametrize("backward", [False, True])
def test_shared_memory(emulator, backward):
    """A block fits compute capabilities 8.6 and 8.9; on 8.0, registers are the limit: 12 or 16 warps."""
    for n in range(1, 600):
        warps, _, _, shared = emulator.plan(shape(1024, n, 1), 1, 108, backward)
        assert shared <= 99 * 1024
        assert warps * A100.resident(REGISTERS[backward], warps, shared) == (12 if backward else 16), n


def test_blocks_per_multiprocessor_in_the_readme(emulator):
    lines = []
    for name, backward in (("forward", False), ("backward", True)):
        for tokens, n in (("64", 64), ("128", 128), ("192", 192), ("256", 256), ("more", 1024)):
            warps, _, _, shared = emulator.plan(shape(1024, n, 1), 1, 132, backward)
            blocks = (str(gpu.resident(REGISTERS[backward], warps, shared)) for gpu in (A100, A10, H100))
            lines.append(f"| {name} | {tokens} | {warps} | {shared:,} | {' | '.join(blocks)} |")
    assert "\n".join(lines) in (emulation.CSRC / "README.md").read_text(), "\n".join(lines)


def test_layouts_of_matrices(emulator):
    """ldmatrix as the PTX ISA draws it; on a GPU, tests/gpu compares the whole probe."""
    lanes = emulator.probe(*probe_inputs())[:, :4]
    rows = lanes.contiguous().view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            first = matrix * 64 + lane // 4 * 8 + 2 * (lane % 4)
            assert rows[lane, matrix].tolist() == [first, first + 1]
