"""What "auto" means, decided while an operation runs on real tensors."""

import torch

from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.choice import repeated_choice
from ditfast.ops.backends.log import note
from ditfast.ops.backends.selfcheck import is_right
from ditfast.ops.op import Op


def resolve(op: Op, name: str, stream: torch.Tensor, branch: torch.Tensor, width: int) -> str:
    """The backend that the running operation takes: ``name``, or in place of "auto" the first kernel that is right.

    Args:
        stream, branch: tensors of the residual stream and of a branch, for their dtypes and device.
        width: the size of what the kernels hold at once: D, the MLP's width, or a patch's.
    """
    if name == "auto":
        name = _first_right(op, stream.device, stream.dtype, branch.dtype, width)
    note(op.name, name)
    return name


def _first_right(op, device, stream, branch, width):
    first = repeated_choice(op)
    for kernel in op.kernels if first is None else (first, *op.kernels):
        if why_not(op, kernel, device.type) is None and is_right(op, kernel, stream, branch, width, device):
            return kernel
    return "reference"
