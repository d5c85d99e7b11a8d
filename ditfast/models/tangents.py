"""What a model under forward-mode AD refuses before PyTorch fails on it, which happens later and with less to say."""

import torch
from torch.autograd import forward_ad

from ditfast.models.wrappers import is_checkpoint


def check_tangents(**values) -> None:
    """Raise a TypeError if a tensor has a tangent of another dtype; PyTorch has checked that the shape is its own.

    What is no tensor has none.
    """
    for name, value in values.items():
        tangent = forward_ad.unpack_dual(value).tangent if isinstance(value, torch.Tensor) else None
        if tangent is not None and tangent.dtype != value.dtype:
            raise TypeError(f"the tangent of {name} must have its dtype, {value.dtype}, got {tangent.dtype}")


def reject_layer(layer) -> None:
    """Raise if ``layer`` is wrapped in what takes no tangents.

    Raises:
        NotImplementedError: activation checkpointing in eager mode, where gradients are wanted; FSDP2 outside of
            ``torch.func.jvp``.
    """
    if torch.compiler.is_compiling():
        return
    if is_checkpoint(layer) and torch.is_grad_enabled():
        raise NotImplementedError(
            "activation checkpointing takes no tangents in eager mode: what it computes again has none and saves "
            "fewer tensors; compile the function that calls torch.func.jvp, or use recompute_mlp=True instead"
        )
    if hasattr(layer, "set_requires_gradient_sync") and not torch._C._are_functorch_transforms_active():
        raise NotImplementedError("FSDP2 takes no tangents of forward_ad.dual_level: use torch.func.jvp")
