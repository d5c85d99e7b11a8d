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
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"ditfast::{name}", fake, lib=_library)
    return getattr(torch.ops.ditfast, name).default


def below_autograd(op, *args):
    """Call ``op`` where its autograd has nothing to do; modes that watch operations still see it."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _no_jvp(name):
    return NotImplementedError(f"{name}: forward-mode AD is not supported by the kernels; use backend='reference'")


def _no_double_backward(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"{name}: double backward is not supported by the kernels; use backend='reference'")

    return backward


def differentiable(name: str, forward_op, backward_op, setup_context, backward):
    """Attach gradients to ``forward_op`` and return the function to call.

    Args:
        backward_op: the operation that computes gradients; it is made to reject differentiation itself.
        setup_context, backward: as in ``torch.library.register_autograd``. ``backward`` gets as its first argument
            a function that calls ``backward_op``.
    """

    def run_backward(ctx, *grads):
        if torch.is_grad_enabled():  # create_graph=True: the operation records that it cannot be differentiated
            return backward(ctx, backward_op, *grads)
        return backward(ctx, lambda *args: below_autograd(backward_op, *args), *grads)

    torch.library.register_autograd(forward_op, run_backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(backward_op, _no_double_backward(name), lib=_library)

    def eager_forward(*args):
        return below_autograd(forward_op, *args)

    def eager_jvp(ctx, *tangents):
        raise _no_jvp(name)

    members = {
        "forward": staticmethod(eager_forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(run_backward),
        "jvp": staticmethod(eager_jvp),
    }
    eager = type(name, (torch.autograd.Function,), members)

    def call(*args):
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                raise _no_jvp(name)
            return forward_op(*args)
        return eager.apply(*args)

    return call
