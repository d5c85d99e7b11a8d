"""Errors planted in the CUDA attention kernels: the emulator or the contract catches each."""

import shutil

import emulator as emulation
import pytest
import torch
from attention_cases import assert_right, far_logits, padded, sample

pytestmark = pytest.mark.skipif(not emulation.available(), reason="needs a C++ compiler")
QUICK = ("-O1", "-DDITFAST_BFLOAT16_ONLY")
BARRIER = "        ptx::sync_block();\n"

# {the error: (file, text, replacement)}
MUTATIONS = {
    "no barrier before a tile is read": ("stream", BARRIER + "        copy(tile", "        copy(tile"),
    "no barrier before delta": ("backward_dkdv", BARRIER + "        if (tile == 0)", "        if (tile == 0)"),
    "no barrier after delta": ("backward_dkdv", BARRIER + "        if (exists", "        if (exists"),
    "tile not waited for": ("stream", "wait_for_copies<1>", "wait_for_copies<2>"),
    "queries not waited for": ("backward_dkdv", "wait_for_copies<0>", "wait_for_copies<1>"),
    "queries where out still is": ("backward_dkdv", "copy_first(0);", "copy_first(0), tiles.copy_first(1);"),
    "first out where its queries are": ("backward_dkdv", "tile > 0 ? tile : exists(1) ? 2 : 1", "tile"),
    "first out where the second is": ("backward_dkdv", "exists(1) ? 2 : 1", "1"),
    "statistics where the first out is": ("backward_dkdv", "+ first_out_bytes(tokens)", ""),
    "delta of the first tile missing": ("backward_dkdv", "if (tile == 0) compute(0);", ""),
    "delta of the wrong tile": ("backward_dkdv", "compute(tile + 1);", "compute(tile + 2);"),
    "ring too short": ("stream", "tile % kRingTiles", "tile % 2"),
    "mask off by one": ("forward", "key >= count", "key > count"),
    "no mask": ("forward", "if (count < kTile) mask(s, count);", ""),
    "mask of dq off by one": ("backward_dq", "% 2 < count", "% 2 <= count"),
    "row past the last stored": ("fragment", "if (row >= tokens)", "if (row > tokens)"),
    "row past the last loaded": ("stream", "inside = row < tokens;", "inside = row <= tokens;"),
    "wrong fragment of k": ("fragment", "k16[step], m[2], m[3]", "k16[step], m[3], m[2]"),
    "wrong row for ldmatrix": ("fragment", "lane() / 16 * 8 +", "lane() / 8 % 2 * 8 +"),
    "wrong fragment of the weights": ("fragment", "c[i / 2][i % 2 * 2],", "c[i % 2][i / 2 * 2],"),
    "last 8 columns dropped": ("fragment", "ptx::mma<T>(c[1], a.k8, m[1]);", ""),
    "stored to a neighbour's place": ("fragment", "8 * (n + odd) - 2 * odd", "8 * (n + odd)"),
    "neighbouring head read": (
        "stream",
        "const int column = (static_cast<int>(part) * heads + h)",
        "const int column = (static_cast<int>(part) * heads + (h ^ 1))",
    ),
    "stride of dout ignored": ("stream", "static_cast<int>(call.dout_stride_n)", "heads * D"),
    "old weights not rescaled": ("forward", "sum[half] *= correction;", ""),
    "lse to the wrong base": ("forward", "ptx::log(total)", "ptx::log(total) * kLog2E"),
    "delta dropped from dq": ("backward_dq", "(ds[i / 4][i % 4] - delta[half])", "ds[i / 4][i % 4]"),
    "delta dropped from dk": ("backward_dkdv", "(ds[n][i] - (i % 2 ? mean.second : mean.first))", "ds[n][i]"),
    "wrong distance of a shuffle": ("fragment", "shuffle_xor(x, 8)", "shuffle_xor(x, 2)"),
    "lanes missing from a sum": ("fragment", "x + ptx::shuffle_xor(x, 16)", "x"),
    "wrong words of dout": ("backward_dq", "+ n % 2 * 2 :", "+ 0 :"),
    "scale dropped from the sums of dq": ("backward_dq", "dquery[n][3]) * scale", "dquery[n][3])"),
    "sums of one warp for all": ("backward_dq", "ptx::opaque(ptx::warp())", "0"),
    "sums of a warp missing": ("backward_dq", "warp < ptx::warps(); ++", "warp + 1 < ptx::warps(); ++"),
    "no barrier before the sums": ("backward_dq", BARRIER + "        const Head again", "        const Head again"),
    "no barrier after the sums": ("backward_dq", BARRIER[:-1] + "  // until", "        // until"),
    "row of the neighbouring group": ("backward_dq", "group / groups.rows()", "0"),
    "row of the neighbouring sample": ("stream", "(std::int64_t{b} * groups + group)", "(b + group)"),
    "sums of the neighbouring head": ("stream", "3 * heads * D + h * D;", "3 * heads * D;"),
    "sums in the wrong place": ("backward_dq", "stream.ring + ring_bytes(tokens);", "stream.ring;"),
    "scale dropped from dk": ("backward_dkdv", "dkey, {scale, scale}", "dkey, {1.0f, 1.0f}"),
}


def check(emulator):
    """Run small cases that together catch every mutation."""
    d, dtype = 72, torch.bfloat16
    for b, n, heads, multiprocessors in ((2, 77, 2, 1), (1, 257, 1, 132)):  # a block processes several groups, or one
        qkv, dout = sample(b, n, heads, d, dtype)
        results = emulator.run(padded(qkv), padded(dout), heads, multiprocessors=multiprocessors)
        assert_right(results, qkv, dout, heads)
    qkv, dout = far_logits(1, 65, 1, d, dtype, -1e4)
    assert_right(emulator.run(qkv, dout, 1, scale=1.0), qkv, dout, 1, scale=1.0)


def test_the_checks_pass_without_a_mutation():
    check(emulation.Emulator(emulation.compile_emulator(options=QUICK)))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path):
    file, text, replacement = MUTATIONS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(emulation.CSRC, csrc)
    source = csrc / "attention" / f"{file}.cuh"
    before = source.read_text()
    assert before.count(text) == 1
    source.write_text(before.replace(text, replacement))
    mutant = emulation.Emulator(emulation.compile_emulator(csrc, options=QUICK))
    with pytest.raises((AssertionError, RuntimeError)):
        check(mutant)
