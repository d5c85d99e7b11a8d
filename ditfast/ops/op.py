"""One record per operation: everything the rest of the package needs to know about it.

Each operation's file ends with its record, and `ditfast.ops.ALL` collects them. Backend choice, self-check, FLOP
counts, the doctor, benchmarks, docs and tests all read these records; none keeps its own list.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PRECISIONS = {  # name -> (dtype of the residual stream, dtype of the branches)
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}
WITH_STREAM = tuple(PRECISIONS)
WITHOUT_STREAM = ("bf16", "fp16", "fp32")  # autocast hands branch-only operations bf16
Backend = str | tuple[str, ...] | None  # a call's ``backend=``, see `ditfast.ops`
PYTORCH = ("sdpa", "reference")  # backends made of PyTorch's own operations; all others are kernels


class RandomTensors:
    """Random tensors for a test problem, with the same values in every dtype.

    Args:
        precision: (stream dtype, branch dtype); values are rounded to these first.
        device: where the tensors live.
        dtype: overrides both dtypes after rounding, e.g. float64 for a reference.
        size: (samples, tokens) of a self-check.

    Attributes:
        stream, branch: the dtypes of the tensors returned.
    """

    def __init__(
        self,
        precision: tuple[torch.dtype, torch.dtype],
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
    ):
        self._rounded, self._device = precision, device
        self.stream, self.branch = (dtype, dtype) if dtype else precision
        self.size = size
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, stream: bool = False, spread: float = 1.0) -> Tensor:
        """Sample a stream or branch tensor from a normal distribution with standard deviation ``spread``."""
        values = torch.randn(shape, generator=self._generator, device=self._device) * spread
        return values.to(self._rounded[0 if stream else 1]).to(self.stream if stream else self.branch)


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """One operation.

    Attributes:
        name: of the public function, and of the operation registered as ``ditfast::<name>``.
        function: the public function.
        backends: name -> the precisions it supports, in the order in which the automatic choice considers them;
            the last is "reference".
        arguments: (`RandomTensors`, B, N, D) -> keyword arguments of the function for a problem of that size.
        outputs: names of the return values.
        parameters: names of arguments shared by all samples; their gradients are sums over the batch.
        self_check: (`RandomTensors`, width, backend) -> {name: tensor}, forward and backward as they run inside the
            registered operations, i.e. without autograd. None if another operation's check covers it.
        auto_precisions: those in which the automatic choice may take a kernel and `ditfast.verify` checks it.
        widths: hidden size D -> the widths on which correctness depends: D itself, the MLP's width, ….
        flops: registered operation -> formula over its arguments, with tensors given as shapes.
        moved: pass -> the token-sized tensors it must read or write; d<name> is a gradient. Traffic of the library's
            GEMMs does not count.
        kernels: the backends that are kernels.
        fallback: the first that is not: what the automatic choice takes where no kernel can run.
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
        # stored, since every call reads them
        object.__setattr__(self, "kernels", tuple(name for name in self.backends if name not in PYTORCH))
        object.__setattr__(self, "fallback", next(name for name in self.backends if name in PYTORCH))


def no_products(*_: object, **__: object) -> int:
    """FLOPs of an elementwise operation: only matrix products are counted."""
    return 0
