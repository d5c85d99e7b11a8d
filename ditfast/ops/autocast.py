"""In which dtype a Linear will read a tensor."""

import torch

from ditfast.ops.backends.availability import device_type

# asked once: torch.compile cannot trace the question in every version
_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would cast ``x`` for a Linear."""
    device = device_type(x)
    return device in _DEVICES and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def linear_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a Linear will read a tensor like ``x``: autocast's, where it is on."""
    return torch.get_autocast_dtype(device_type(x)) if autocasts(x) else x.dtype
