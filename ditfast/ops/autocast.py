"""In which dtype a Linear will read a tensor."""

import torch


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would cast ``x`` for a Linear."""
    device = x.device.type
    possible = x.dtype != torch.float64 and torch.amp.is_autocast_available(device)
    return possible and torch.is_autocast_enabled(device)


def linear_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a Linear will read a tensor like ``x``: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
