"""In which dtype a Linear will read a tensor."""

import torch

from ditfast.ops.backends.availability import device_type

# asked once: torch.compile cannot trace the question in every version
_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would cast ``x`` for a Linear."""
    device = device_type(x)
    return device in _DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def cast_for_inference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` in the dtype in which a Linear reads it; on a GPU from autocast's cache, as a Linear takes it."""
    if weight.dtype != dtype and weight.is_cuda and not torch.compiler.is_compiling():
        # on autocast's list for GPUs; an only operand is handed on as it is
        weight = torch.einsum("...->...", weight)
    return weight.to(dtype)


def linear_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a Linear will read a tensor like ``x``: autocast's, where it is on."""
    return torch.get_autocast_dtype(device_type(x)) if autocasts(x) else x.dtype
