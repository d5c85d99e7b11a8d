"""One record per operation: all that the rest of the package has to know of it.

Each operation's file ends with its record, and `ditfast.ops.ALL` collects them. The choice of a backend, the
self-check, FLOP counts, the doctor, benchmarks, documents and tests read them and keep no list of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PRECISIONS = {  # name -> dtype of the residual stream, of the branches
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
WITH_STREAM = tuple(PRECISIONS)
WITHOUT_STREAM = ("bf16", "fp16", "fp32")  # autocast gives an operation on branches alone bf16
PYTORCH = ("sdpa", "reference")  # backends that are PyTorch's own operations; all others are kernels


class RandomTensors:
    """Makes the tensors of a problem, with the same values in every dtype that is asked for.

    Args:
        precision: dtype of the residual stream, of the branches; values are rounded to them.
        device: where the tensors are.
        dtype: of all tensors, in place of the precision's, as float64 for a reference.
        size: samples and tokens of a self-check.

    Attributes:
        stream, branch: the dtypes that tensors have.
    """

    def __init__(self, precision, device, dtype=None, size=None):
        self._rounded, self._device = precision, device
        self.stream, self.branch = (dtype, dtype) if dtype else precision
        self.size = size
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape, stream=False, spread=1.0):
        """A tensor of the residual stream or of a branch, normal with standard deviation ``spread``."""
        values = torch.randn(shape, generator=self._generator, device=self._device) * spread
        return values.to(self._rounded[0 if stream else 1]).to(self.stream if stream else self.branch)


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: of the public function, and of the operation registered as ``ditfast::<name>``.
        function: the public function.
        backends: name -> the precisions in which it runs, in the order in which the automatic choice considers them;
            the last is "reference".
        arguments: (`RandomTensors`, B, N, D) -> arguments of the function by name, for a problem of such a size.
        outputs: names of what the function returns.
        parameters: names that belong to no sample; their gradients are sums over the batch.
        self_check: (`RandomTensors`, width, backend) -> {name: tensor}, forward and backward as they run inside the
            registered operations, that is without autograd. None where another operation's check stands for it.
        auto_precisions: those in which the automatic choice may take a kernel, and `ditfast.verify` checks it.
        widths: hidden size D -> the widths that decide whether a kernel is right: D, or the MLP's width, ….
        flops: registered operation -> formula of its arguments, tensors given by their shapes.
        moved: pass -> the tensors over all tokens that it has to read or write; d<name> is a gradient. What the
            library's matrix products move does not count.
        kernels: the backends that are not PyTorch's own operations.
        fallback: the first that is: what the automatic choice takes where no kernel can run.
    """

    name: str
    function: Callable
    backends: dict[str, tuple[str, ...]]
    arguments: Callable
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    self_check: Callable | None = None
    auto_precisions: tuple[str, ...] = ()
    widths: Callable[[int], tuple[int, ...]] = lambda hidden_size: (hidden_size,)
    flops: dict[str, Callable] = field(default_factory=dict)
    moved: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kernels: tuple[str, ...] = field(init=False)
    fallback: str = field(init=False)

    def __post_init__(self):
        # kept, because every call reads them
        object.__setattr__(self, "kernels", tuple(name for name in self.backends if name not in PYTORCH))
        object.__setattr__(self, "fallback", next(name for name in self.backends if name in PYTORCH))


def no_products(*_, **__) -> int:
    """FLOPs of an elementwise operation: matrix products alone are counted."""
    return 0
