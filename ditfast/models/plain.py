"""Whether a fusion may take the place of a submodule's own call, and what none can work on."""

import torch
import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook

ORDINARY = (torch.Tensor, torch.nn.Parameter)  # types of tensors that are just memory
_FUSED = (
    nn.Linear,
    nn.LayerNorm,
    nn.GELU,
    nn.Identity,
    nn.Dropout,
    nn.Sequential,
    nn.SiLU,
    nn.Conv2d,
    nn.Embedding,
)
# class -> its own forward, for which fusions stand; None where it was replaced before this was imported
_ORIGINAL = {
    cls: cls.forward if cls.forward.__module__ == cls.__module__ and not hasattr(cls.forward, "__wrapped__") else None
    for cls in _FUSED
}


def remember_forward(cls: type) -> type:
    """A class decorator: from now on `is_plain` and `has_original_forward` know the class."""
    _ORIGINAL[cls] = cls.forward
    return cls


def forget_forward(cls: type) -> None:
    """From now on `is_plain` and `has_original_forward` know the class, and say no."""
    _ORIGINAL[cls] = None


def is_original(cls: type) -> bool:
    """Whether ``cls`` still has the forward that was remembered."""
    return cls.forward is _ORIGINAL[cls]


def is_plain(module: torch.nn.Module, cls: type) -> bool:
    """Whether calling ``module`` does exactly what the forward of ``cls`` does, and nobody watches the call.

    False for subclasses (LoRA, float8, parametrizations), for hooks (the module's or torch.nn's global ones), for
    a ``forward`` patched on the instance or the class, and for parameters of a special tensor type (quantized,
    distributed). Nothing is remembered between calls.
    """
    if type(module) is not cls or cls.forward is not _ORIGINAL[cls] or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if _has_any_global_hook():
        return False
    for p in module._parameters.values():
        if p is not None and type(p) not in ORDINARY:
            return False
    return True


def are_plain(modules: dict[str, torch.nn.Module], kinds: dict[str, type]) -> bool:
    """Whether ``modules`` have these names and classes, and each `is_plain` but for its parameters."""
    if tuple(modules) != tuple(kinds) or _has_any_global_hook():
        return False
    for module, cls in zip(modules.values(), kinds.values(), strict=True):
        if type(module) is not cls or cls.forward is not _ORIGINAL[cls]:
            return False
        own = module.__dict__
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def is_bare_layer_norm(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a plain LayerNorm over the last dimension without parameters, as adaLN modulates it."""
    return (
        is_plain(module, nn.LayerNorm)
        and module.weight is None
        and module.bias is None
        and len(module.normalized_shape) == 1
    )


def is_known(module: torch.nn.Module) -> bool:
    """Whether `is_plain` holds for the class that ``module`` has."""
    return type(module) in _ORIGINAL and is_plain(module, type(module))


def has_original_forward(module: torch.nn.Module, cls: type) -> bool:
    """Whether ``module`` executes the forward of ``cls``, replaced neither in a class nor on the instance."""
    return getattr(type(module), "forward", None) is _ORIGINAL[cls] and "forward" not in module.__dict__


def parameter(module: torch.nn.Module, name: str):
    """What ``module.<name>`` gives, several times faster."""
    value = module._parameters.get(name)
    return getattr(module, name) if value is None else value


def is_watched(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` runs hooks other than those of torch.distributed, which take any structure."""
    dicts = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    if not any(dicts):  # as nearly always
        return _has_any_global_hook()
    found = [hook for hooks in dicts for hook in hooks.values()]
    foreign = [hook for hook in found if not (getattr(hook, "__module__", "") or "").startswith("torch.distributed.")]
    return bool(foreign) or _has_any_global_hook()


def reject_symbolic(x) -> None:
    """Raise a TypeError if x is what ``torch.fx.symbolic_trace`` passes through a module."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError("x must be a tensor, got a Proxy: use torch.export in place of torch.fx.symbolic_trace")
