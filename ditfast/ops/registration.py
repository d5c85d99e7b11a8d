"""How an operation becomes known to PyTorch: schema, fake, autograd.

Under ``torch.compile`` the registered operation itself is called. In eager mode an ``autograd.Function`` over the
same pieces takes half the time per call. Both reject what a kernel cannot do: forward-mode AD (a registered
operation would silently give zero tangents) and double backward.
"""

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("ditfast", "DEF")


def define(schema: str, implementation, fake):
    """Register ``ditfast::<schema>`` for CPU and CUDA and return the operation."""
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CPU")
    _library.impl(name, _on_its_device(implementation), "CUDA")
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_library)
    return getattr(torch.ops.ditfast, name).default


def _on_its_device(implementation):
    """Kernels are launched on the current device: make it that of the first argument."""

    def guarded(x, *args):
        if x.device.index == torch.cuda.current_device():
            return implementation(x, *args)
        with torch.cuda.device(x.device):
            return implementation(x, *args)

    return guarded


def _below_autograd(op, *args):
    """Call ``op`` where its autograd has nothing to do; modes that watch operations still see it."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def is_tracked(args) -> bool:
    """Whether anything wants derivatives of this call: autograd, forward-mode AD or a function transform."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def run_in_backward(op, *args):
    """Call ``op`` inside a backward: with its own autograd only under ``create_graph=True``."""
    return op(*args) if torch.is_grad_enabled() else _below_autograd(op, *args)


def reject_double_backward(name: str, backward_op) -> None:
    """Make the gradients of ``name`` say that they cannot be differentiated; they would pass for constants."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"{name}: double backward is not supported by the kernels; use backend='reference'")

    torch.library.register_autograd(backward_op, backward, lib=_library)


def differentiable(name: str, op, setup_context, backward):
    """Attach gradients to ``op`` and return the function to call.

    Args:
        setup_context, backward: as in ``torch.library.register_autograd``; ``backward`` calls operations with
            `run_in_backward`.
    """
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_library)
    no_jvp = f"{name}: forward-mode AD is not supported by the kernels; use backend='reference'"

    def forward(*args):
        return _below_autograd(op, *args)

    def jvp(ctx, *tangents):
        raise NotImplementedError(no_jvp)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
    }
    eager = type(name, (torch.autograd.Function,), members)

    def call(*args):
        if not torch.compiler.is_compiling():
            return eager.apply(*args) if is_tracked(args) else _below_autograd(op, *args)
        if forward_ad._current_level >= 0:
            raise NotImplementedError(no_jvp)
        return op(*args)

    return call
