"""Wrappers around a block or final layer: PyTorch's, which pass their arguments on, and others."""

import torch.nn as nn

from ditfast.models.plain import is_watched

_INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")  # checkpointing, compile, FSDP1


def is_native(layer: nn.Module) -> bool:
    """Whether ``layer``, possibly inside PyTorch's wrappers, is one of this package's with its own forward.

    Any other wrapper counts as a foreign layer, even if it forwards attributes of the layer inside.
    """
    innermost = _layers(layer)[-1]
    return hasattr(type(innermost), "is_native") and innermost.is_native


def accepts_carry(layer: nn.Module) -> bool:
    """Whether a native layer may be given a `Carry`: it accepts one, and no hook that expects tokens sees it."""
    layers = _layers(layer)
    return hasattr(layers[-1], "takes_carry") and not any(is_watched(each) or _is_reentrant(each) for each in layers)


def is_checkpoint(layer: nn.Module) -> bool:
    """Whether ``layer`` recomputes its activations in backward."""
    return any(hasattr(each, "checkpoint_impl") for each in _layers(layer))


def _layers(layer):
    """``layer`` and, while that is one of PyTorch's wrappers, the layer inside."""
    layers = [layer]
    while str(type(layer).forward.__module__).startswith("torch."):
        inside = [layer._modules[name] for name in _INSIDE if name in layer._modules]
        if not inside:
            break
        layer = inside[0]
        layers.append(layer)
    return layers


def _is_reentrant(layer):
    """Whether this is a checkpoint wrapper that loses gradients of tensors inside a tuple."""
    return getattr(layer.__dict__.get("checkpoint_impl"), "name", "") == "REENTRANT"
