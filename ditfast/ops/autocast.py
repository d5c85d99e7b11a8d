"""The dtype in which a Linear will read a tensor."""

import torch
from torch import Tensor

from ditfast.ops.backends.availability import device_type

# asked once: not every version of torch.compile can trace this call
_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def autocasts(x: Tensor) -> bool:
    """Whether autocast would cast ``x`` for a Linear."""
    device = device_type(x)
    return device in _DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def cast_for_inference(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``weight`` as a Linear would; on a GPU through autocast's weight cache."""
    if weight.dtype == dtype:  # the usual case, in a third of the time of `to`
        return weight
    if weight.is_cuda and not torch.compiler.is_compiling():
        # einsum is on autocast's list for GPUs, and returns a lone operand unchanged
        weight = torch.einsum("...->...", weight)
    return weight.to(dtype)


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a Linear will read ``x``: autocast's if enabled, else its own."""
    return torch.get_autocast_dtype(device_type(x)) if autocasts(x) else x.dtype
