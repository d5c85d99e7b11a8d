"""What "auto" means, decided while an operation runs on real tensors."""

from torch import Tensor

from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.choice import repeated_choice
from ditfast.ops.backends.log import note
from ditfast.ops.backends.selfcheck import is_right
from ditfast.ops.op import Op


def resolve(op: Op, name: str, stream: Tensor, branch: Tensor, width: int) -> str:
    """The running operation's backend: ``name``, or for "auto" the first kernel that is correct here.

    Args:
        stream, branch: tensors of the residual stream and of a branch, for their dtypes and device.
        width: size of a row that kernels hold at once: D, the MLP's width, or a patch's.
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
