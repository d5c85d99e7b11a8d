"""The CUDA attention kernels' machine code, and calls with bad arguments or without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("ditfast._C")

needs_cuda_build = pytest.mark.skipif(_C.build_config()["cuda"] is None, reason="the extension is built without CUDA")


def cuobjdump(*options):
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("needs cuobjdump")
    return subprocess.run([tool, *options, _C.__file__], capture_output=True, text=True, check=True).stdout


def architectures():
    return [name for name in _C.build_config()["architectures"] if name.startswith("sm_")]


@needs_cuda_build
def test_registers_and_shared_memory():
    """Two blocks of every kernel fit a multiprocessor's registers, and nothing spills."""
    pattern = r"Function \S*(attention_(?:for|back)ward)\S*:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump("-res-usage"))
    assert len(usage) == 8 * len(architectures())
    threads = {"attention_forward": 256, "attention_backward": 192}
    for name, registers, *others in usage:
        assert int(registers) * threads[name] * 2 <= 65536
        assert others in (["0", "0", "0"], ["0", "1024", "0"]), (
            f"{name}: stack, shared (1024 are reserved), local memory"
        )


@needs_cuda_build
@pytest.mark.parametrize("arch", architectures())
def test_instructions(arch):
    """Tensor cores, ldmatrix and asynchronous copies are used, local memory is not."""
    kernels = re.split(r"\n\s*Function : ", cuobjdump("-sass", "-arch", arch))[1:]
    kernels = {
        code.split("\n", 1)[0].strip(): code for code in kernels if re.match(r"\S*attention_(for|back)ward", code)
    }
    assert len(kernels) == 8
    for name, code in kernels.items():
        dtype = r"\.BF16" if "BFloat16" in name else ""
        assert re.search(rf"HMMA\.16816\.F32{dtype} ", code), name
        assert bool(re.search(rf"HMMA\.1688\.F32{dtype} ", code)) == ("Li72E" in name), name
        assert re.search(r"LDSM\.16\.M88\.4 ", code) and re.search(r"LDSM\.16\.MT88\.4 ", code), name
        assert re.search(r"LDGSTS\.E\.BYPASS\.128 ", code), name
        assert not re.search(r"\b(STL|LDL|ATOM|RED)\b", code), name


def call(backward=False, **changes):
    """A correct call except for ``changes``, with addresses that are never read."""
    fields = {"dtype": "bfloat16", "batch": 1, "tokens": 3, "heads": 1, "head_dim": 64, "scale": 0.125}
    fields |= {"stride_b": 576, "stride_n": 192, "device": 0, "stream": 0, "qkv": 4096, "out": 4096, "lse": 4096}
    if backward:
        fields |= {"dout": 4096, "dqkv": 4096, "dout_stride_b": 192, "dout_stride_n": 64}
    (_C.attention_backward_cuda if backward else _C.attention_forward_cuda)(**(fields | changes))


BAD_IN_BOTH = [
    ({"dtype": "float32"}, "dtype must be bfloat16 or float16, got 'float32'"),
    ({"head_dim": 80}, "head_dim must be 64 or 72, got 80"),
    ({"scale": -1.0}, "scale must be above 0, got -1.0"),
    ({"scale": float("nan")}, "scale must be finite, got nan"),
    ({"tokens": -1}, "tokens must be at least 0, got -1"),
    ({"tokens": 2**31}, "tokens must be at most 1073741823, got 2147483648"),
    ({"heads": 2**24}, "3 * heads * head_dim must be at most 1073741823, got 3221225472"),
    ({"batch": 2**30 - 1, "tokens": 640}, "batch * heads * tokens must be less than 2^36"),
    ({"stride_n": 196}, "stride_n must be a multiple of 8 (16 bytes), got 196"),
    ({"stride_b": 577}, "stride_b must be a multiple of 8 (16 bytes), got 577"),
    ({"qkv": 0}, "qkv must be a pointer to a non-empty tensor, got null"),
    ({"qkv": 24}, "qkv must be 16-byte aligned, got 24"),
    ({"out": 36}, "out must be 16-byte aligned, got 36"),
    ({"lse": 22}, "lse must be 4-byte aligned, got 22"),
]
BAD_IN_BACKWARD = [
    ({"dout": 24}, "dout must be 16-byte aligned, got 24"),
    ({"dbias": 22}, "dbias must be 4-byte aligned, got 22"),
    ({"dqkv": 24}, "dqkv must be 16-byte aligned, got 24"),
    ({"dout_stride_n": 65}, "dout_stride_n must be a multiple of 8 (16 bytes), got 65"),
    ({"dout_stride_b": 4}, "dout_stride_b must be a multiple of 8 (16 bytes), got 4"),
]


@pytest.mark.parametrize(("change", "message"), BAD_IN_BOTH, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_forward_call(change, message):
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        call(**change)


@pytest.mark.parametrize(
    ("change", "message"), BAD_IN_BOTH + BAD_IN_BACKWARD, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_backward_call(change, message):
    with pytest.raises(ValueError, match=re.escape(f"attention: {message}")):
        call(backward=True, **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("backward", [False, True])
def test_without_a_gpu_the_reason_is_named(backward):
    built = _C.build_config()["cuda"] is not None
    reason = "driver|no CUDA-capable device" if built else "built without CUDA"
    with pytest.raises(RuntimeError, match=reason):
        call(backward)
    assert re.search(reason, _C.cuda_attention_supported(0))


@needs_cuda_build
def test_empty_problem_needs_no_gpu():
    call(tokens=0)
    call(backward=True, batch=0)
