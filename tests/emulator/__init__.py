"""The CUDA attention kernels on the host: compiled once, called with CPU tensors."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/attention/params.h
# a fortified longjmp refuses to switch between the stacks of fibers
COMMON = ["-std=c++17", "-fPIC", "-DDITFAST_EMULATE", "-U_FORTIFY_SOURCE"]
NAN = float("nan")


class Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim", "stride_b", "stride_n")),
        ("scale", ctypes.c_float),
    ]


class Forward(ctypes.Structure):
    _fields_ = [("problem", Problem), *((name, ctypes.c_void_p) for name in ("qkv", "out", "lse"))]


class Backward(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        *((name, ctypes.c_void_p) for name in ("dout", "qkv", "out", "lse", "dqkv", "dbias")),
        *((name, ctypes.c_int64) for name in ("dout_stride_b", "dout_stride_n", "dout_stride_c")),
    ]


class Bytes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("qkv", "out", "lse", "dout", "dqkv", "dbias")]


def compile_emulator(csrc=CSRC, options=("-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas")):
    """Compile the library that runs the kernels in ``csrc``; return its path."""
    flags = [*COMMON, *options, f"-I{csrc}", f"-I{HERE}"]
    machine = compiled(".o", [HERE / "machine.cpp"], ["-c", *COMMON, "-O2", f"-I{HERE}"], HERE.glob("machine*"))
    sources = [*csrc.glob("attention/*.*h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]
    return compiled(".so", [HERE / "emulator.cpp", machine], ["-shared", *flags], sources)


def compiled(suffix, inputs, flags, sources):
    """Return the path of the compiler's output, rebuilt only if a source or an option has changed."""
    compiler = os.environ.get("CXX", "g++")
    options = [flag for flag in flags if not flag.startswith("-I")]
    parts = [repr((compiler, options)).encode(), *(source.read_bytes() for source in sorted(sources))]
    folder = Path(tempfile.gettempdir()) / f"ditfast-emulator-{os.getuid()}"
    result = folder / (hashlib.sha256(b"".join(parts)).hexdigest()[:16] + suffix)
    if not result.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        made = result.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*shlex.split(compiler), *flags, *map(str, inputs), "-o", str(made)], check=True)
        made.rename(result)  # atomic for other processes
    return result


def available():
    return shutil.which(os.environ.get("CXX", "g++").split()[0]) is not None


def span(t):
    """Bytes from a tensor's first element to its last."""
    return t.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))


class Emulator:
    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.emulate_forward.restype = ctypes.c_char_p
        self.library.emulate_backward.restype = ctypes.c_char_p
        self.library.probe.restype = ctypes.c_char_p
        self.library.groups.argtypes, self.library.groups.restype = [ctypes.c_int64], ctypes.c_int64

    def forward(self, qkv, heads, scale=None, multiprocessors=132):
        """Return out and lse; both start as NaN, between canaries."""
        b, n, width = qkv.shape
        out, lse = Guarded((b, n, width // 3), qkv.dtype), Guarded((b, heads, n), torch.float32)
        call = Forward(problem(qkv, heads, scale), qkv.data_ptr(), out.t.data_ptr(), lse.t.data_ptr())
        self.call("emulate_forward", call, Bytes(span(qkv), span(out.t), span(lse.t)), multiprocessors)
        return out.checked(), lse.checked()

    def backward(self, dout, qkv, out, lse, heads, scale=None, multiprocessors=132, bias=True):
        """Return dqkv, and rows of dbias (B, groups, 3*H*d) or None."""
        b, n, width = qkv.shape
        dqkv = Guarded(qkv.shape, qkv.dtype)
        dbias = Guarded((b, self.library.groups(n), width), torch.float32)
        pointers = [t.data_ptr() for t in (dout, qkv, out, lse, dqkv.t)]
        call = Backward(problem(qkv, heads, scale), *pointers, dbias.t.data_ptr() if bias else None, *dout.stride())
        sizes = Bytes(*map(span, (qkv, out, lse, dout, dqkv.t, dbias.t)))
        self.call("emulate_backward", call, sizes, multiprocessors)
        return dqkv.checked(), dbias.checked() if bias else None

    def run(self, qkv, dout, heads, scale=None, multiprocessors=132):
        """Return out, lse, dqkv and rows of dbias."""
        out, lse = self.forward(qkv, heads, scale, multiprocessors)
        return out, lse, *self.backward(dout, qkv, out, lse, heads, scale, multiprocessors)

    def plan(self, qkv, heads, multiprocessors, backward=False):
        """Return warps per block, blocks per head, blocks in the grid, bytes of shared memory."""
        numbers = (ctypes.c_int64 * 4)()
        self.library.plan(ctypes.byref(problem(qkv, heads, None)), multiprocessors, int(backward), numbers)
        return list(numbers)

    def probe(self, matrices, operands):
        out = torch.zeros(32, 28, dtype=torch.int32)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (matrices, operands, out)]
        assert not self.library.probe(*pointers)
        return out

    def call(self, name, arguments, sizes, multiprocessors):
        function = getattr(self.library, name)
        message = function(ctypes.byref(arguments), ctypes.byref(sizes), ctypes.c_int(multiprocessors)).decode()
        if message:
            raise RuntimeError(message)


def problem(qkv, heads, scale):
    b, n, width = qkv.shape
    d = width // (3 * heads)
    return Problem(
        DTYPES[qkv.dtype], b, n, heads, d, qkv.stride(0), qkv.stride(1), d**-0.5 if scale is None else scale
    )


class Guarded:
    """A tensor of NaN between two canaries."""

    MARGIN = 64  # elements; keeps the tensor's alignment

    def __init__(self, shape, dtype):
        size = torch.Size(shape).numel()
        self.memory = torch.full((size + 2 * self.MARGIN,), 1234.0, dtype=dtype)
        self.t = self.memory[self.MARGIN : self.MARGIN + size].view(shape)
        self.t.fill_(NAN)

    def checked(self):
        assert (self.memory[: self.MARGIN] == 1234).all(), "wrote before the tensor"
        assert (self.memory[-self.MARGIN :] == 1234).all(), "wrote after the tensor"
        return self.t
