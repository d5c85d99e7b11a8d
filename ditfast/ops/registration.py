"""How an operation becomes known to PyTorch: schema, fake, autograd, forward-mode AD, vmap.

Under ``torch.compile`` the registered operation itself is called. Eager mode bypasses the dispatcher and calls the
implementation directly, inside an ``autograd.Function`` if gradients are needed: that halves the Python overhead.
Tangents are unpacked from the arguments first (`ditfast.ops.tangents`), since a registered operation would silently
return zero tangents. Double backward and tangents of tangents raise an error.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ditfast.ops.backends.log import current_log, record_in
from ditfast.ops.bypass import is_intercepted
from ditfast.ops.duals import put_together, take_apart
from ditfast.ops.sizes import Sizes
from ditfast.ops.vmap import vmap_rule

NAMESPACE = __package__.partition(".")[0]  # "ditfast", or the name under which a copy was loaded
_library = torch.library.Library(NAMESPACE, "DEF")
_implementations: dict[OpOverload, Callable] = {}  # operation -> its Python implementation, for any device
_forms: dict[OpOverload, "Form"] = {}
_calls: dict[OpOverload, Callable] = {}  # operation -> the function that calls it with autograd


class Form(NamedTuple):
    """How an operation was registered, for operations derived from it."""

    name: str
    fake: object
    rules: dict[str, str]
    sample_dims: tuple | None
    shared: tuple[str, ...]


def describe(op: OpOverload) -> Form:
    """How ``op`` was registered."""
    return _forms[op]


def register_op(
    schema: str,
    implementation: Callable,
    fake: Callable,
    rules: dict[str, str],
    *,
    sample_dims: tuple[int | None, ...] | None = None,
    shared: tuple[str, ...] = (),
) -> OpOverload:
    """Register ``ditfast::<schema>`` for CPU and CUDA and return the operation.

    Args:
        schema: its last argument is the backend.
        rules: shapes and dtypes of the tensors, see `ditfast.ops.sizes`.
        sample_dims, shared: see `vmap_rule`; without them vmap calls the operation in a loop.
    """
    sizes, implementation = Sizes(schema, rules), _without_autocast(implementation)
    _library.define(schema)
    for device, function in (("CPU", implementation), ("CUDA", _on_its_device(implementation))):
        _library.impl(sizes.op, sizes.checked(function), device)
    torch.library.register_fake(f"{NAMESPACE}::{sizes.op}", sizes.checked_fake(fake), lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), sizes.op).default
    torch.library.register_vmap(op, vmap_rule(op, sample_dims, shared, sizes.dense), lib=_library)
    _implementations[op] = implementation
    _forms[op] = Form(sizes.op, fake, rules, sample_dims, tuple(shared))
    return op


def _without_autocast(implementation):
    """Switch autocast off inside: its casts were made before the call, and backward may run under another one."""

    def run(*args):
        with torch._C._DisableAutocast():
            return implementation(*args)

    return run


def _on_its_device(implementation):
    """Make the first argument's device current, since kernels are launched on the current device."""

    def guarded(*args):
        if _is_on_current_device(args[0]):
            return implementation(*args)
        with torch.cuda.device(args[0].device):
            return implementation(*args)

    return guarded


def _is_on_current_device(x):
    return not x.is_cuda or x.get_device() == torch._C._cuda_getDevice()


def call_below_autograd(op: OpOverload, *args: object) -> Any:
    """Call ``op`` without autograd."""
    return _call_traced(op, args) if torch.compiler.is_compiling() else _call_eagerly(op, args)


def _call_eagerly(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        is_seen = torch.autograd._profiler_enabled() or is_intercepted(args)
        if is_seen or not _is_on_current_device(args[0]):
            return _call_traced(op, args)
        return _implementations[op](*args)


def _call_traced(op, args):
    """Call ``op`` where a tracer may record it; ONNX, which has no such operation, gets its formulas."""
    if not torch.compiler.is_dynamo_compiling() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
        return _implementations[op](*args[:-1], "reference")
    return op(*args)


def is_tracked(args: Sequence) -> bool:
    """Whether anything differentiates this call: autograd, forward-mode AD or a function transform."""
    if forward_ad._current_level >= 0:
        return True
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return True
    return False


_functorch = torch._C._functorch
_is_batched = _functorch.is_legacy_batchedtensor  # gradients under is_grads_batched=True


def run_in_backward(op: OpOverload, *args: object) -> Any:
    """Call ``op`` inside a backward; with its own autograd only if that backward may be differentiated."""
    if any(_is_batched(a) for a in args if isinstance(a, Tensor)):
        return op(*args)
    return _calls[op](*args) if torch.is_grad_enabled() else call_below_autograd(op, *args)


def reject_double_backward(name: str, backward_op: OpOverload) -> None:
    """Make differentiating the gradients of ``name`` an error; they would be taken for constants."""
    why = f"{name}: double backward is not supported by the kernels; use backend='reference'"
    attach_autograd(name, backward_op, lambda ctx, inputs, output: None, _raising(why), no_jvp=why)


def _raising(why):
    def derivative(*_):
        raise NotImplementedError(why)

    return derivative


def attach_autograd(
    name: str,
    op: OpOverload,
    setup_context: Callable,
    backward: Callable,
    jvp: Callable | None = None,
    no_jvp: str | None = None,
) -> Callable:
    """Attach gradients to ``op`` and return the function to call.

    Args:
        setup_context, backward: as in ``torch.library.register_autograd``; ``backward`` calls operations through
            `run_in_backward`.
        jvp: (arguments, a tangent or None for each tensor among them) -> (outputs of ``op``, tangents of the leading
            ones). None if unsupported.
        no_jvp: the error message in that case.
    """
    backward = _where_defined(backward, len(op._schema.arguments))
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_library)
    no_jvp = no_jvp or f"{name}: forward-mode AD is not supported by the kernels; use backend='reference'"
    jvp = jvp or _raising(no_jvp)
    in_transforms, eager = _functions(name, op, setup_context, backward, jvp)
    apply = super(torch.autograd.Function, eager).apply  # which takes half the time, outside of function transforms
    names = [a.name for a in op._schema.arguments]

    def call(*args):
        if forward_ad._current_level >= 0 and may_be_dual():
            primals, tangents = take_apart(name, names, args)
            if any(t is not None for t in tangents):
                return put_together(*jvp(primals, tangents))
        if torch.compiler.is_compiling():
            return _call_traced(op, args)
        if not is_tracked(args):
            return _call_eagerly(op, args)
        if not torch._C._are_functorch_transforms_active():
            return apply(*_unwrapped(args))
        if (single_jvp := _single_jvp()) is None:
            return in_transforms.apply(*args)
        with single_jvp.lower():  # which has no more to do: the tangents are known
            return apply(*_unwrapped(args, single_jvp.level()))

    _calls[op] = call
    return call


def _where_defined(backward, arguments):
    """Autograd may call a backward without any gradient, if a function upstream returns none."""

    def run(ctx, *grads):
        return (None,) * arguments if all(g is None for g in grads) else backward(ctx, *grads)

    return run


def may_be_dual() -> bool:
    """Whether arguments may carry tangents here; in a vmap inside a jvp they surface only at a lower level."""
    return forward_ad._current_level >= 0 and (torch.compiler.is_compiling() or not _is_in_vmap())


def _is_in_vmap():
    innermost = _functorch.peek_interpreter_stack()
    return innermost is not None and innermost.key() == _functorch.TransformType.Vmap


def _unwrapped(args, level=0):
    """The arguments as they are below the transform of this level, and without transforms that ended."""
    args = [_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
    return [_functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in args] if level else args


def _single_jvp():
    """The transform in force if it is a ``torch.func.jvp`` inside of no other; else None."""
    first, *more = _functorch.get_interpreter_stack()
    return None if more or first.key() != _functorch.TransformType.Jvp else coerce_cinterpreter(first)


def _functions(name, op, setup_context, backward, jvp):
    """Two versions of one ``autograd.Function``: for function transforms, and a cheaper one for eager mode."""
    returned = len(op._schema.returns)

    def forward(*args):
        return call_below_autograd(op, *args)

    def forward_with_context(ctx, *args):
        output = _call_eagerly(op, args)
        setup_context(ctx, args, output)
        ctx.log = current_log()
        return output

    def recorded_backward(ctx, *grads):
        if ctx.log is None:
            return backward(ctx, *grads)
        with record_in(ctx.log):  # backward may run in another thread
            return backward(ctx, *grads)

    def setup_in_transforms(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*(a for a in inputs if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in inputs]

    def second_pass(ctx, *tangents):
        """Tangents of a call that could not see them on its arguments: a vmap or grad inside the jvp hid them."""
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if other is None else other[0] for other in ctx.others]
        tangents = [t for a, t in zip(args, tangents, strict=True) if a is None or isinstance(a, Tensor)]
        outputs, found = jvp(args, tangents)
        if returned == 1:
            return found[0]
        rest = outputs[len(found) :]  # not differentiable, but vmap needs a tensor
        return *found, *(torch.zeros_like(t) if _is_in_vmap() else None for t in rest)

    pair = (
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward),
            "setup_context": staticmethod(setup_in_transforms),
            "jvp": staticmethod(second_pass),
            "generate_vmap_rule": True,  # the operations inside have their own rules
        },
        {"forward": staticmethod(forward_with_context), "backward": staticmethod(recorded_backward)},
    )
    return [type(name, (torch.autograd.Function,), members) for members in pair]
