"""What may stand around a block or final layer: PyTorch's wrappers, which pass on what they are given, and others."""

import torch.nn as nn

from ditfast.models.plain import is_watched

_INSIDE = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")  # checkpointing, compile, FSDP1


def is_native(layer: nn.Module) -> bool:
    """Whether ``layer``, maybe in wrappers of PyTorch's, is one of this package's with its own forward.

    Other wrappers are foreign layers, although they may pass on the attributes of what they hold.
    """
    innermost = _layers(layer)[-1]
    return hasattr(type(innermost), "is_native") and innermost.is_native


def accepts_carry(layer: nn.Module) -> bool:
    """Whether a native layer may be given a `Carry`: it takes one, and nobody sees it who expects tokens."""
    layers = _layers(layer)
    return hasattr(layers[-1], "takes_carry") and not any(is_watched(each) or _is_reentrant(each) for each in layers)


def is_checkpoint(layer: nn.Module) -> bool:
    """Whether ``layer`` computes its activations again in backward."""
    return any(hasattr(each, "checkpoint_impl") for each in _layers(layer))


def _layers(layer):
    """``layer``, and what is inside as long as it is a wrapper of PyTorch's."""
    layers = [layer]
    while str(type(layer).forward.__module__).startswith("torch."):
        inside = [layer._modules[name] for name in _INSIDE if name in layer._modules]
        if not inside:
            break
        layer = inside[0]
        layers.append(layer)
    return layers


def _is_reentrant(layer):
    """Whether it is a checkpoint that loses the gradients of tensors inside a tuple."""
    return getattr(layer.__dict__.get("checkpoint_impl"), "name", "") == "REENTRANT"
