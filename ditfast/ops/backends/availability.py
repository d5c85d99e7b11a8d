"""Which backends can run on this machine, and why the others cannot."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from ditfast.load_extension import NAME as EXTENSION
from ditfast.load_extension import load_extension
from ditfast.ops.op import Op

BACKENDS = ("cuda", "host", "reference", "sdpa", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that kernels read and write

CALLED = (  # functions of the extension that are used
    "attention_backward_cuda",
    "attention_backward_groups",
    "attention_backward_host",
    "attention_forward_cuda",
    "attention_forward_host",
    "attention_jvp_host",
    "cuda_attention_supported",
    "gelu_backward",
    "gelu_forward",
    "gelu_jvp",
    "gemm",
    "has_amx",
    "isa",
    "norm",
    "rows_backward",
    "rows_forward",
    "rows_jvp",
)
_installed = {name: importlib.util.find_spec(name) is not None for name in ("triton", EXTENSION)}
_on_gpu: dict[int, str | None] = {}  # device index -> why the extension's GPU code cannot run there


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: Op, name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run ``op`` on this device type; None if it can."""
    if name not in op.backends:
        return f"{op.name} has no such backend (it has {', '.join(op.backends)})"
    return why_not_backend(name, device_type)


def why_not_backend(name: str, device_type: str) -> str | None:
    """Why backend ``name``, or "auto", cannot run on this device type, whatever the operation; None if it can."""
    if name not in ("auto", *BACKENDS):
        return f"there is no such backend (there are {', '.join(BACKENDS)})"
    if name == "triton":
        return _why_not_triton(device_type)
    if name in ("cuda", "host"):
        return _why_not_extension(name, device_type)
    return None


def _why_not_triton(device_type):
    if not _installed["triton"]:
        return "triton is not installed"
    if device_type != "cuda" and not interpreting():
        return f"triton needs a CUDA tensor, or TRITON_INTERPRET=1, got a tensor on {device_type}"
    return None


def _why_not_extension(name, device_type):
    reason = why_not_loaded()
    if reason is not None:
        return reason
    if name == "host":
        return None if device_type == "cpu" else f"host needs a CPU tensor, got a tensor on {device_type}"
    if device_type != "cuda":
        return f"cuda needs a CUDA tensor, got a tensor on {device_type}"
    return _why_not_on_this_gpu()


def why_not_loaded() -> str | None:
    """Why the extension cannot be called; None if it can."""
    if not _installed[EXTENSION]:
        return "the extension ditfast._C is not built"
    try:
        extension = load_extension()
    except ImportError as error:
        return f"the extension ditfast._C does not load: {error}"
    return _why_not_current(extension)


@cache
def _why_not_current(extension):
    """Detect an extension built before the sources changed, as happens in an editable install."""
    missing = [name for name in CALLED if not hasattr(extension, name)]
    return f"the extension ditfast._C is older than ditfast and lacks {missing[0]}: rebuild it" if missing else None


def _why_not_on_this_gpu():
    from ditfast import _C

    index = torch.cuda.current_device()
    if index not in _on_gpu:
        _on_gpu[index] = _C.cuda_attention_supported(index) or None
    return _on_gpu[index]


# as torch.compiler.assume_constant_result, without importing the compiler: the extension cannot be traced
for _function in (why_not_loaded, _why_not_on_this_gpu):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def device_type(t: Tensor) -> str:
    """``t.device.type``, several times faster: that builds a string on every call."""
    return "cuda" if t.is_cuda else "cpu" if t.is_cpu else t.device.type


def why_not_dtype(*tensors: Tensor | None) -> str | None:
    """Why kernels do not support the dtypes of these tensors; None if they do."""
    for t in tensors:
        if t is not None and t.dtype not in KERNEL_DTYPES:
            return f"the kernels support float32, float16 and bfloat16, got {t.dtype}"
    return None
