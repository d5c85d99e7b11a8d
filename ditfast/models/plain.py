"""Whether a fusion may take the place of a submodule's own call."""

import torch
from torch.nn.modules.module import _has_any_global_hook

_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def is_plain(module: torch.nn.Module, cls: type) -> bool:
    """Whether calling ``module`` does exactly what the forward of ``cls`` does, and nobody watches the call.

    False for subclasses (LoRA, float8, parametrizations), for hooks (the module's or torch.nn's global ones), for
    a ``forward`` patched on the instance, and for parameters of a special tensor type (quantized, distributed).
    """
    return (
        type(module) is cls
        and has_original_forward(module, cls)
        and not is_hooked(module)
        and all(p is None or type(p) in _ORDINARY for p in module._parameters.values())
    )


def has_original_forward(module: torch.nn.Module, cls: type) -> bool:
    """Whether ``module`` executes the forward of ``cls``, overridden neither in a subclass nor on the instance."""
    return getattr(type(module), "forward", None) is cls.forward and "forward" not in module.__dict__


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` runs hooks."""
    return any(_hooks(module)) or _has_any_global_hook()


def is_watched(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` runs hooks other than those of torch.distributed, which take any structure."""
    found = [hook for hooks in _hooks(module) for hook in hooks.values()]
    foreign = [hook for hook in found if not getattr(hook, "__module__", "").startswith("torch.distributed.")]
    return bool(foreign) or _has_any_global_hook()


def _hooks(module):
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
