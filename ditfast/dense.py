"""The kind of tensors that operations, models, diffusion and flows take."""

import torch
from torch import Tensor


def dense(name: str, value: Tensor) -> None:
    """Require a dense tensor: not sparse, mkldnn or nested."""
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.layout is torch.strided else value.layout
        raise TypeError(f"{name} must be a dense tensor, torch.strided, got {got}")
