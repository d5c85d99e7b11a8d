"""Whether a fusion may replace a call of a submodule."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

_Module = TypeVar("_Module", bound=type[nn.Module])
ORDINARY = (Tensor, nn.Parameter)  # tensor types that are plain memory
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
# class -> the forward that fusions replace; None if it was patched before this import
_ORIGINAL: dict[type[nn.Module], Callable | None] = {
    cls: cls.forward if cls.forward.__module__ == cls.__module__ and not hasattr(cls.forward, "__wrapped__") else None
    for cls in _FUSED
}


# hooks for every module: torch fills and empties these, and never replaces them
_FORWARD, _FORWARD_PRE = _module._global_forward_hooks, _module._global_forward_pre_hooks
_BACKWARD, _BACKWARD_PRE = _module._global_backward_hooks, _module._global_backward_pre_hooks


def _has_global_hook() -> bool:
    return bool(_FORWARD or _FORWARD_PRE or _BACKWARD or _BACKWARD_PRE)


def remember_forward(cls: _Module) -> _Module:
    """Class decorator: make the class known to `is_plain` and `has_original_forward`."""
    _ORIGINAL[cls] = cls.forward
    return cls


def forget_forward(cls: type[nn.Module]) -> None:
    """Make `is_plain` and `has_original_forward` return False for the class from now on."""
    _ORIGINAL[cls] = None


def is_original(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` still has the forward it was registered with."""
    return cls.forward is _ORIGINAL[cls]


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` does exactly what the forward of ``cls`` does, unobserved.

    False for subclasses (LoRA, float8, parametrizations), for hooks (the module's or torch.nn's global ones), for
    a ``forward`` patched on the instance or the class, and for parameters of a special tensor type (quantized,
    distributed). Nothing is cached between calls.
    """
    own = module.__dict__  # its values take a third of the time of attributes
    if type(module) is not cls or cls.forward is not _ORIGINAL[cls] or "forward" in own:
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if _has_global_hook():
        return False
    for p in own["_parameters"].values():
        if p is not None and type(p) not in ORDINARY:
            return False
    return True


def are_plain(modules: dict[str, nn.Module], kinds: dict[str, type[nn.Module]]) -> bool:
    """Whether ``modules`` have these names and classes, and each `is_plain` apart from its parameters."""
    if tuple(modules) != tuple(kinds) or _has_global_hook():
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


def is_bare_layer_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a plain LayerNorm over the last dimension without parameters, as in adaLN."""
    own = module._parameters
    has_none = own.get("weight", module) is None and own.get("bias", module) is None
    return is_plain(module, nn.LayerNorm) and has_none and len(cast(nn.LayerNorm, module).normalized_shape) == 1


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` `is_plain` for its own class."""
    return type(module) in _ORIGINAL and is_plain(module, type(module))


def has_original_forward(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` runs the original forward of ``cls``, not one patched on a class or the instance."""
    return getattr(type(module), "forward", None) is _ORIGINAL[cls] and "forward" not in module.__dict__


def parameter(module: nn.Module, name: str) -> Any:
    """``module.<name>``, several times faster."""
    value = module._parameters.get(name)
    return getattr(module, name) if value is None else value


def is_watched(module: nn.Module) -> bool:
    """Whether calling ``module`` runs hooks other than torch.distributed's, which accept any structure."""
    dicts = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    if not any(dicts):  # nearly always
        return _has_global_hook()
    found = [hook for hooks in dicts for hook in hooks.values()]
    foreign = [hook for hook in found if not (getattr(hook, "__module__", "") or "").startswith("torch.distributed.")]
    return bool(foreign) or _has_global_hook()


def reject_symbolic(x: object) -> None:
    """Raise a TypeError if x is a Proxy of ``torch.fx.symbolic_trace``."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError("x must be a tensor, got a Proxy: use torch.export instead of torch.fx.symbolic_trace")
