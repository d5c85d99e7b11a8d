"""The CUDA attention kernels on the host: compiled once, called with CPU tensors."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/attention/params.h
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
        *((name, ctypes.c_void_p) for name in ("dout", "qkv", "out", "lse", "dqkv")),
        *((name, ctypes.c_int64) for name in ("dout_stride_b", "dout_stride_n", "dout_stride_c")),
    ]


class Bytes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("qkv", "out", "lse", "dout", "dqkv")]


def compile_emulator(csrc=CSRC):
    """Path of the library, made anew only when a source has changed."""
    sources = sorted([*csrc.glob("attention/*.*h"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    compiler = os.environ.get("CXX", "g++")
    digest = hashlib.sha256(b"".join([compiler.encode(), *(source.read_bytes() for source in sources)])).hexdigest()
    library = Path(tempfile.gettempdir()) / f"ditfast-emulator-{os.getuid()}" / f"{digest[:16]}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DDITFAST_EMULATE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        files = [str(HERE / "machine.cpp"), str(HERE / "emulator.cpp")]
        subprocess.run([compiler, *flags, f"-I{csrc}", f"-I{HERE}", *files, "-o", str(made)], check=True)
        made.rename(library)  # other processes see all of it or nothing
    return library


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

    def forward(self, qkv, heads, scale=None, multiprocessors=132):
        """out and lse, each NaN before the call and between canaries."""
        b, n, width = qkv.shape
        out, lse = Guarded((b, n, width // 3), qkv.dtype), Guarded((b, heads, n), torch.float32)
        call = Forward(problem(qkv, heads, scale), qkv.data_ptr(), out.t.data_ptr(), lse.t.data_ptr())
        self.run("emulate_forward", call, Bytes(span(qkv), span(out.t), span(lse.t)), multiprocessors)
        return out.checked(), lse.checked()

    def backward(self, dout, qkv, out, lse, heads, scale=None, multiprocessors=132):
        dqkv = Guarded(qkv.shape, qkv.dtype)
        pointers = [t.data_ptr() for t in (dout, qkv, out, lse, dqkv.t)]
        call = Backward(problem(qkv, heads, scale), *pointers, *dout.stride())
        self.run("emulate_backward", call, Bytes(*map(span, (qkv, out, lse, dout, dqkv.t))), multiprocessors)
        return dqkv.checked()

    def run(self, name, call, sizes, multiprocessors):
        function = getattr(self.library, name)
        message = function(ctypes.byref(call), ctypes.byref(sizes), ctypes.c_int(multiprocessors)).decode()
        if message:
            raise RuntimeError(message)


def problem(qkv, heads, scale):
    b, n, width = qkv.shape
    d = width // (3 * heads)
    return Problem(DTYPES[qkv.dtype], b, n, heads, d, qkv.stride(0), qkv.stride(1), d**-0.5 if scale is None else scale)


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
        assert (self.memory[-self.MARGIN :] == 1234).all(), "wrote behind the tensor"
        return self.t
