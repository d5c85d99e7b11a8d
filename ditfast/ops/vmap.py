"""How ``torch.func.vmap`` runs a registered operation: all calls as one batch, or in a loop."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch._ops import OpOverload


def vmap_rule(
    op: OpOverload, sample_dims: tuple[int | None, ...] | None, shared: tuple[str, ...], dense: Collection[str] = ()
) -> Callable:
    """Return a rule for ``torch.library.register_vmap`` that turns V calls into one with V * B samples if possible.

    It is not possible if the calls differ in an argument shared by all samples, such as a weight, or if the operation
    sums over samples, as a weight's gradient does.

    Args:
        op: the operation.
        sample_dims: for each output its sample dimension, along which V * B samples can be split; None for a sum over
            samples, which is empty unless a shared argument is given. None instead of a tuple: always loop.
        shared: names of tensor arguments shared by all samples; all others have B as their first dimension.
        dense: names of those that must be contiguous, which slices and expanded tensors are not.
    """
    is_shared = [argument.name in shared for argument in op._schema.arguments]
    is_dense = [argument.name in dense for argument in op._schema.arguments]
    sums = sample_dims is None or None in sample_dims

    def rule(info, in_dims, *args):
        calls = info.batch_size
        is_mapped = [isinstance(dim, int) for dim in in_dims]  # for a list argument, dim is a list
        args = [a.movedim(dim, 0) if m else a for a, dim, m in zip(args, in_dims, is_mapped, strict=True)]
        given = [m for a, m, s in zip(args, is_mapped, is_shared, strict=True) if s and a is not None]
        if sample_dims is None or any(given) or (sums and given):
            return _one_by_one(op, args, is_mapped, is_dense, calls)
        for i, a in enumerate(args):
            if isinstance(a, Tensor) and not is_shared[i]:
                a = a if is_mapped[i] else a.expand(calls, *a.shape)  # (V, B, …)
                a = a.flatten(0, 1)  # (V*B, …)
                args[i] = a.contiguous() if is_dense[i] else a
        return _split(op(*args), sample_dims, calls)

    return rule


def _one_by_one(op, args, is_mapped, is_dense, calls):
    """Outputs of V calls, stacked, and the dimension of V in each."""
    args = [a.contiguous() if m and d else a for a, m, d in zip(args, is_mapped, is_dense, strict=True)]
    outputs = [op(*(a[i] if m else a for a, m in zip(args, is_mapped, strict=True))) for i in range(calls)]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _split(outputs, sample_dims, calls):
    """Split the outputs of one call with V * B samples; also return where V is in each, None for empty sums."""

    def split(t, dim):
        return t if dim is None else t.unflatten(dim, (calls, t.shape[dim] // calls))

    if isinstance(outputs, Tensor):
        return split(outputs, sample_dims[0]), sample_dims[0]
    return tuple(split(t, dim) for t, dim in zip(outputs, sample_dims, strict=True)), sample_dims
