"""Checks of a model under forward-mode AD, where PyTorch would fail later and with a worse message."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.models.wrappers import is_checkpoint


def check_tangents(**values: object) -> None:
    """Raise a TypeError if a tensor's tangent has another dtype; PyTorch checks its shape. Ignores non-tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        tangent = forward_ad.unpack_dual(value).tangent
        if tangent is not None and tangent.dtype != value.dtype:
            raise TypeError(f"the tangent of {name} must have its dtype, {value.dtype}, got {tangent.dtype}")


def reject_layer(layer: nn.Module) -> None:
    """Raise if ``layer`` is wrapped in something that does not support tangents.

    Raises:
        NotImplementedError: activation checkpointing in eager mode with gradients; FSDP2 outside ``torch.func.jvp``.
    """
    if torch.compiler.is_compiling():
        return
    if is_checkpoint(layer) and torch.is_grad_enabled():
        raise NotImplementedError(
            "activation checkpointing does not support tangents in eager mode: the recomputation has none and saves "
            "fewer tensors; compile the function that calls torch.func.jvp, or use recompute_mlp=True instead"
        )
    if hasattr(layer, "set_requires_gradient_sync") and not torch._C._are_functorch_transforms_active():
        raise NotImplementedError("FSDP2 does not support forward_ad.dual_level: use torch.func.jvp")
