"""How ``torch.func.vmap`` runs a registered operation: all calls in one batch, or one after the other."""

import torch


def vmap_rule(op, sample_dims, shared):
    """A rule for ``torch.library.register_vmap``. Of V calls it makes one with V * B samples where it can.

    It cannot where calls differ in an argument that belongs to no sample, such as a weight, or where the operation
    sums over samples, as the gradient of a weight does.

    Args:
        op: the operation.
        sample_dims: for each output its dimension of samples, where V * B of them can be told apart; None for a sum
            over samples, which is empty unless a shared argument is given. None for all: one call after the other.
        shared: names of the tensor arguments that belong to no sample; all others have B as their first dimension.
    """
    is_shared = [argument.name in shared for argument in op._schema.arguments]
    sums = sample_dims is None or None in sample_dims

    def rule(info, in_dims, *args):
        calls = info.batch_size
        is_mapped = [isinstance(dim, int) for dim in in_dims]  # the dims of a list are a list
        args = [a.movedim(dim, 0) if m else a for a, dim, m in zip(args, in_dims, is_mapped, strict=True)]
        given = [m for a, m, s in zip(args, is_mapped, is_shared, strict=True) if s and a is not None]
        if sample_dims is None or any(given) or (sums and given):
            return _one_by_one(op, args, is_mapped, calls)
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and not is_shared[i]:
                a = a if is_mapped[i] else a.expand(calls, *a.shape)  # (V, B, …)
                args[i] = a.flatten(0, 1)  # (V*B, …)
        return _split(op(*args), sample_dims, calls)

    return rule


def _one_by_one(op, args, is_mapped, calls):
    """The outputs of V calls, stacked, and the dimension of V in each."""
    outputs = [op(*(a[i] if m else a for a, m in zip(args, is_mapped, strict=True))) for i in range(calls)]
    if isinstance(outputs[0], torch.Tensor):
        return torch.stack(outputs), 0
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _split(outputs, sample_dims, calls):
    """The outputs of one call with V * B samples, with a dimension of V, and where it is; None for empty sums."""

    def split(t, dim):
        return t if dim is None else t.unflatten(dim, (calls, t.shape[dim] // calls))

    if isinstance(outputs, torch.Tensor):
        return split(outputs, sample_dims[0]), sample_dims[0]
    return tuple(split(t, dim) for t, dim in zip(outputs, sample_dims, strict=True)), sample_dims
