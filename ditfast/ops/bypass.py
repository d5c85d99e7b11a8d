"""When an eager call may go past the dispatcher, straight to a kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

# argument types of operations; of all tensors, only plain memory
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype))


def is_intercepted(args: Sequence) -> bool:
    """Whether the dispatcher must see this call before a kernel does: a kernel reads nothing but memory.

    It must for modes, transforms, tracers, subclasses, and tensors that hold minus their memory or zeros without any.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or _has_function_mode():
        return True
    if torch._C._get_tracing_state() is not None or not (args[0].is_cuda or args[0].is_cpu):
        return True
    if not _ORDINARY.issuperset(map(type, args)):
        return True
    for a in args:
        if isinstance(a, Tensor) and (a.is_neg() or a._is_zerotensor()):
            return True
    return False


def is_transformed() -> bool:
    """Whether a function transform (torch.func) is active, in compiled code too."""
    return torch._C._are_functorch_transforms_active()


# as torch.compiler.assume_constant_result, without importing the compiler, which cannot trace this question
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_function_mode():
    """Whether a ``TorchFunctionMode`` is active, other than a default device, which concerns no call with tensors."""
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:
            return True
    return False
