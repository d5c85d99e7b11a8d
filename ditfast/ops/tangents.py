"""Forward-mode AD of the registered operations: one call computes outputs and tangents.

PyTorch asks an ``autograd.Function`` for its outputs first and their tangents later, which takes two passes, and
``torch.compile`` rejects such a Function. So dual tensors are unpacked before the call and repacked after it, and a
second operation, ``ditfast::<name>_jvp``, takes the tangents too. Its outputs have the same gradients as those of the
first; asking for the gradient of a tangent raises an error.

The tangent of ``a`` is called ``a_t`` and has its shape and dtype; None stands for zero.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from ditfast.ops.registration import attach_autograd, describe, may_be_dual, register_op

_functorch = torch._C._functorch


def register_jvp(
    op: OpOverload, implementation: Callable, setup_context: Callable, backward: Callable, outputs: int
) -> Callable:
    """Register ``ditfast::<name>_jvp`` and return the ``jvp`` to pass to `attach_autograd` for ``op``.

    Args:
        op: the operation; its last argument is the backend.
        implementation: takes the arguments of ``op`` and, before the backend, a tangent (or None) for each tensor;
            returns the outputs, then the tangents of the leading ones.
        setup_context, backward: those of ``op``.
        outputs: how many leading outputs have tangents; the others have no gradients either.
    """
    form = describe(op)
    *arguments, _ = op._schema.arguments
    names = [a.name for a in arguments if "Tensor" in str(a.type)]
    count, returned = len(arguments), len(op._schema.returns)

    def fake(*args):
        out = form.fake(*args[:count], args[-1])
        out = out if returned > 1 else (out,)
        return *out, *(torch.empty_like(t) for t in out[:outputs])

    def setup(ctx, inputs, output):
        setup_context(ctx, (*inputs[:count], inputs[-1]), output[:returned] if returned > 1 else output[0])
        ctx.set_materialize_grads(False)  # None for a tangent that is not differentiated
        ctx.likes = [(t.shape, t.dtype) for t in output[:outputs]]

    def backward_of_outputs(ctx, *grads):
        if any(g is not None for g in grads[returned:]):
            raise NotImplementedError(
                f"{form.name}: the gradient of a tangent is not supported by the kernels: detach the tangent, or use "
                "backend='reference'"
            )
        some = next(g for g in grads if g is not None)
        given = zip(grads, ctx.likes, strict=False)
        dense = [some.new_zeros((), dtype=dtype).expand(shape) if g is None else g for g, (shape, dtype) in given]
        found = backward(ctx, *dense, *[None] * (returned - outputs))
        return *found[:count], *[None] * len(names), found[-1]

    own, _ = str(op._schema).split("::")[1].split(", str backend")
    tangents = "".join(f", Tensor? {name}_t" for name in names)
    schema = f"{own}{tangents}, str backend) -> ({', '.join(['Tensor'] * (returned + outputs))})"
    jvp_op = register_op(
        schema.replace("(", "_jvp(", 1),
        implementation,
        fake,
        form.rules | {f"{name}_t": f"{form.rules[name].split()[0]} {name}" for name in names},
        sample_dims=form.sample_dims and (*form.sample_dims, *form.sample_dims[:outputs]),
        shared=(*form.shared, *(f"{name}_t" for name in form.shared)),
    )
    why = f"{form.name}: a derivative of a tangent is not supported by the kernels; use backend='reference'"
    call = attach_autograd(f"{form.name}_jvp", jvp_op, setup, backward_of_outputs, no_jvp=why)

    def jvp(args, tangents):
        if not torch.compiler.is_compiling():
            tangents = _without_history(args, tangents)
        result = call(*args[:-1], *tangents, args[-1])
        return (result[:returned] if returned > 1 else result[0]), result[returned:]

    return jvp


def _without_history(args, tangents):
    """Detach the tangents: PyTorch's Linears save tensors for their gradients, which are an error here anyway.

    Only where they are an error: where the outputs are differentiated in every way in which the tangents would be.
    """
    stack = _functorch.get_interpreter_stack() or ()
    if sum(each.key() == _functorch.TransformType.Jvp for each in stack) > 1:
        return tangents
    if not _tracked_levels(tangents) <= _tracked_levels(a for a in args if isinstance(a, Tensor)):
        return tangents
    return [None if t is None else t.detach() for t in tangents]


def _tracked_levels(tensors):
    """The function-transform levels at which any of these requires a gradient; -1 is ordinary autograd."""
    found = set()
    for t in tensors:
        while t is not None:
            if t.requires_grad:
                found.add(_functorch.maybe_get_level(t))
            t = _functorch.get_unwrapped(t) if _functorch.is_functorch_wrapped_tensor(t) else None
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in two products if x alone has a tangent; PyTorch also multiplies x by the weight's, of zeros."""
    if may_be_dual():
        primal, tangent = forward_ad.unpack_dual(x)
        if tangent is not None and not _is_dual(weight) and not _is_dual(bias):
            return forward_ad.make_dual(F.linear(primal, weight, bias), F.linear(tangent, weight))
    return F.linear(x, weight, bias)


def _is_dual(t):
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def linear_tangent(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    linear: Callable = F.linear,
) -> Tensor | None:
    """The tangent of ``linear(x, weight, bias)``, x (M, I), weight (O, I); None for zero."""
    if x_t is None and weight_t is None:
        # a copy: an operation may not return its input
        return None if bias_t is None else bias_t.repeat(x.shape[0], 1)
    if x_t is None:
        return linear(x, weight_t, bias_t)
    out = linear(x_t, weight, bias_t)
    return out if weight_t is None else out.add_(linear(x, weight_t))
