"""The CUDA attention kernels on a GPU. Tests that an emulator can run are in tests/csrc/test_attention.py."""

import os
from pathlib import Path

import emulator as emulation
import pytest
import torch
from attention_cases import NAN, assert_right, far_logits, padded, parts, probe_inputs, sample

_C = pytest.importorskip("ditfast._C")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_C.build_config()["cuda"] is None, reason="the extension is built without CUDA"),
]
DTYPES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [64, 72]
GOLDEN = Path(__file__).parent / "layouts.txt"


def launch(function, qkv, heads, scale, **options):
    b, n, width = qkv.shape
    d = width // (3 * heads)
    function(
        dtype=str(qkv.dtype).removeprefix("torch."),
        batch=b,
        tokens=n,
        heads=heads,
        head_dim=d,
        stride_b=qkv.stride(0),
        stride_n=qkv.stride(1),
        scale=d**-0.5 if scale is None else scale,
        device=qkv.device.index,
        stream=torch.cuda.current_stream(qkv.device).cuda_stream,
        **{name: t.data_ptr() if isinstance(t, torch.Tensor) else t for name, t in options.items()},
    )


def empty(qkv, heads):
    """out, lse, dqkv and rows of dbias, filled with NaN."""
    b, n, width = qkv.shape
    rows = b, _C.attention_backward_groups(n), width
    shapes = ((b, n, width // 3), qkv.dtype), ((b, heads, n), torch.float32), ((b, n, width), qkv.dtype)
    shapes += ((rows, torch.float32),)
    return [torch.full(shape, NAN, dtype=dtype, device=qkv.device) for shape, dtype in shapes]


def run_into(tensors, qkv, dout, heads, scale=None):
    out, lse, dqkv, dbias = tensors
    launch(_C.attention_forward_cuda, qkv, heads, scale, qkv=qkv, out=out, lse=lse)
    strides = {"dout_stride_b": dout.stride(0), "dout_stride_n": dout.stride(1)}
    given = {"dout": dout, "qkv": qkv, "out": out, "lse": lse}
    launch(_C.attention_backward_cuda, qkv, heads, scale, dqkv=dqkv, dbias=dbias, **given, **strides)


def run(qkv, dout, heads, scale=None):
    results = empty(qkv, heads)
    run_into(results, qkv, dout, heads, scale)
    return results


def assert_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_supported():
    assert _C.cuda_attention_supported(torch.cuda.current_device()) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 192, 255, 256, 257, 320, 1000, 1024, 4096])
def test_contract(n, d, dtype):
    b, heads = (3, 5) if n < 1000 else (1, 3)
    qkv, dout = sample(b, n, heads, d, dtype, device="cuda")
    assert_right(run(padded(qkv), padded(dout), heads), qkv, dout, heads)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("level", [-1e4, 1e4])
@pytest.mark.parametrize("n", [1, 65, 257])
def test_logits_of_large_magnitude(n, level, d):
    qkv, dout = far_logits(2, n, 3, d, torch.bfloat16, level, device="cuda")
    assert_right(run(qkv, dout, 3, scale=1.0), qkv, dout, 3, scale=1.0)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("n", [77, 257])
def test_neighbours_do_not_matter(n, d):
    qkv, dout = sample(3, n, 3, d, torch.bfloat16, device="cuda")
    expected = run(qkv, dout, 3)
    for t in parts(qkv, 3):
        t[:, :, ::2] = NAN
    dout.view(3, n, 3, d)[:, :, ::2] = NAN
    out, lse, dqkv, _ = run(qkv, dout, 3)
    assert torch.equal(out.view(3, n, 3, d)[:, :, 1], expected[0].view(3, n, 3, d)[:, :, 1])
    assert torch.equal(lse[:, 1], expected[1][:, 1])
    for got, right in zip(parts(dqkv, 3), parts(expected[2], 3), strict=True):
        assert torch.equal(got[:, :, 1], right[:, :, 1])


@pytest.mark.parametrize("n", [64, 256, 1000])
def test_100_runs_are_bit_equal(n):
    qkv, dout = sample(7, n, 3, 72, torch.bfloat16, device="cuda")
    first = run(qkv, dout, 3)
    for _ in range(100):
        assert_equal(run(qkv, dout, 3), first)


def test_bit_equal_for_any_batch():
    """In a large batch, a block computes a whole head; a single head is split."""
    qkv, dout = sample(64, 256, 16, 72, torch.bfloat16, device="cuda")
    whole = run(qkv, dout, 16)
    assert_equal(run(qkv[5:6], dout[5:6], 16), [t[5:6] for t in whole])


def test_more_heads_than_a_grid_is_high():
    qkv, dout = sample(4500, 1, 16, 64, torch.bfloat16, device="cuda")
    out, _, dqkv, _ = run(qkv, dout, 16)
    assert torch.equal(out, qkv.chunk(3, dim=-1)[2])
    assert torch.equal(dqkv.chunk(3, dim=-1)[2], dout)


def test_graph():
    qkv, dout = sample(2, 256, 3, 72, torch.bfloat16, device="cuda")
    results, graph = run(qkv, dout, 3), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_into(results, qkv, dout, 3)
    for seed in (1, 2):
        for t, new in zip((qkv, dout), sample(2, 256, 3, 72, torch.bfloat16, seed), strict=True):
            t.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(results, run(qkv, dout, 3))


def test_stream():
    """The kernels wait for earlier work on their own stream, and for nothing else."""
    qkv, dout = sample(2, 256, 3, 72, torch.bfloat16, device="cuda")
    expected = run(qkv, dout, 3)
    late, results, stream = torch.zeros_like(qkv), empty(qkv, 3), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(qkv)
        run_into(results, late, dout, 3)
    assert not stream.query(), "the calls return before the work is done"
    stream.synchronize()
    assert_equal(results, expected)


def test_device_is_restored():
    qkv, dout = sample(1, 64, 1, 64, torch.bfloat16, device=f"cuda:{torch.cuda.device_count() - 1}")
    run(qkv, dout, 1)
    assert torch.cuda.current_device() == 0


def test_layouts():
    """What this GPU's ldmatrix and mma deliver to each lane, compared with the emulator and the committed record."""
    inputs = [t.cuda() for t in probe_inputs()]
    out = torch.zeros(32, 28, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    matrices, operands = (t.data_ptr() for t in inputs)
    _C.attention_probe(matrices=matrices, operands=operands, out=out.data_ptr(), device=0, stream=stream)
    got = out.cpu()
    text = "".join(" ".join(f"{word & 0xFFFFFFFF:08x}" for word in lane) + "\n" for lane in got.tolist())
    folder = os.environ.get("DITFAST_GOLDEN_DIR")
    if folder is not None:  # written before anything that may fail here
        (Path(folder) / GOLDEN.name).write_text(text)
    emulated = emulation.Emulator(emulation.compile_emulator()).probe(*probe_inputs())
    assert torch.equal(got, emulated)
    if not GOLDEN.exists():
        pytest.skip("no record is committed; DITFAST_GOLDEN_DIR=... writes one")
    assert text == GOLDEN.read_text()
