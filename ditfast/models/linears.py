"""How a model calls its Linears outside the fused operations."""

import torch.nn as nn
from torch import Tensor

from ditfast.models.plain import is_plain, parameter
from ditfast.ops import tangents
from ditfast.ops.registration import may_be_dual


def call_linears(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; in forward-mode AD a plain Linear, or a Sequential's, skips products with tangents of zeros."""
    if not may_be_dual():
        return module(x)
    if is_plain(module, nn.Sequential):
        for layer in module._modules.values():
            x = call_linears(layer, x)  # type: ignore[arg-type]  # a Sequential holds no None
        return x
    if is_plain(module, nn.Linear):
        return tangents.linear(x, parameter(module, "weight"), parameter(module, "bias"))
    return module(x)
