"""Matrix products on the CPU by our kernel or oneDNN, where those beat PyTorch, and on weights packed for oneDNN.

The kernel computes float32, where oneDNN breaks the numerical contract. oneDNN computes bfloat16: with a bias,
`F.linear` makes it accumulate into a prefilled output; these calls do not. Packed weights are copies in oneDNN's own
layout; `packed` defines the block of code in which they exist.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ditfast.ops import host, tangents
from ditfast.ops.autocast import autocasts, linear_dtype
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.per_thread import PerThread, setting
from ditfast.ops.bypass import is_intercepted
from ditfast.ops.registration import is_tracked


class _Pack(NamedTuple):
    weight: Tensor
    version: int
    source: Tensor  # shares the weight's memory and keeps it from being reused
    packed: Tensor


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # gradients under is_grads_batched=True
_packs = PerThread("packs", {})  # id of a weight -> _Pack


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, I) @ weight (O, I).T + bias (O,) or None: (M, O). For plain tensors, below autograd."""
    if _takes_onednn(x, weight, bias):
        return _onednn(x, weight, bias)
    return host.product(x, weight.t(), bias) if _takes_kernel(x, weight.t(), bias) else F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N): (M, N). For plain tensors, below autograd."""
    return host.product(a, b) if _takes_kernel(a, b) else a @ b


def linear_on_packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, using the packed copy of ``weight`` if there is one."""
    packed = _packed(weight)
    is_packed = packed is not None and _takes_onednn(x, weight, bias)
    return _onednn(x, packed, bias) if is_packed else linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of `linear_on_packed`, where possible in the pass that writes it."""
    if _takes_kernel(x, weight.t(), bias):
        return host.product_gelu(x, weight.t(), bias, keep_product=False)[1]
    return host.gelu_(linear_on_packed(x, weight, bias))


def linear_and_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`linear` and its GELU (tanh), (M, O) each, for a backward that needs both."""
    if _takes_kernel(x, weight.t(), bias):
        return host.product_gelu(x, weight.t(), bias, keep_product=True)
    pre = linear(x, weight, bias)
    return pre, host.gelu(pre)


def linear_with_autograd(x: Tensor, weight: Tensor, bias: Tensor | None, backends: tuple[str, ...]) -> Tensor:
    """`F.linear`, replaced for eager tensors where another way is faster, except on the reference.

    Without derivatives by `linear_on_packed`, with gradients and no bias by the float32 kernel, in forward-mode AD by
    `tangents.linear`. Under autocast, weight and bias must already be in its dtype.
    """
    tensors = x, weight, bias
    if forward_ad._current_level >= 0:
        return F.linear(*tensors) if _is_reference(backends) else tangents.linear(*tensors)
    if not x.is_cpu or torch.compiler.is_compiling() or not _may_gain(x, weight):
        return F.linear(*tensors)
    is_training = is_tracked(tensors)
    if is_intercepted(tensors) or (is_training and not _gains_a_node(x, weight, bias)):
        return F.linear(*tensors)
    if autocasts(x):
        if any(t is not None and t.dtype != linear_dtype(x) for t in (weight, bias)):
            return F.linear(*tensors)
        x = x.to(weight.dtype)
    if _is_reference(backends) or not is_right(weight):
        return F.linear(*tensors)
    rows = x.reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight) if is_training else linear_on_packed(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _gains_a_node(x, weight, bias):
    """Whether the float32 kernel is faster in training; a bias's gradient takes a pass that PyTorch has, too."""
    if bias is not None or autocasts(x) or min(weight.shape) < on_cpu.NODE_FROM:
        return False
    return _takes_kernel(x.reshape(-1, x.shape[-1]), weight.t())


class _Linear(torch.autograd.Function):
    """`linear` without a bias, for plain tensors: x (M, I), weight (O, I)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        is_plain = not (torch.is_grad_enabled() or is_intercepted((dout, x, weight)) or _is_batched(dout))
        product = matmul if is_plain else torch.matmul  # which has derivatives of its own
        with torch._C._DisableAutocast():
            dx = product(dout, weight) if ctx.needs_input_grad[0] else None
            return dx, product(dout.t(), x) if ctx.needs_input_grad[1] else None


def is_right(weight: Tensor) -> bool:
    """Whether what replaces PyTorch for a Linear with this weight (O, I), if anything, is right by the self-check."""
    dtype = weight.dtype
    is_replaced = dtype == torch.float32 or on_cpu.takes_onednn(dtype)
    return not is_replaced or on_cpu.product_is_right(dtype, weight.shape[1])


def _may_gain(x, weight):
    if on_cpu.takes_onednn(weight.dtype):
        return True
    columns, inner = weight.shape
    return inner > 0 and on_cpu.takes_product(weight.dtype, x.numel() // inner, columns, inner)


def _is_reference(backends):
    return next((name for name in backends if name in ("auto", "host", "reference")), None) == "reference"


@contextmanager
def packed(weights: Iterable[Tensor]) -> Iterator[None]:
    """Make `linear_on_packed` use packed copies of these weights (O, I) inside the ``with`` block, in this thread.

    A weight that is written to or replaced meanwhile is used directly, not through its copy. Writes through ``.data``
    go unnoticed.
    """
    mine = {id(weight): _pack(weight) for weight in weights if _can_be_packed(weight)}
    with setting(_packs, _packs.own | mine):
        yield


def _onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes_onednn(x, weight, bias=None) -> bool:
    """Whether oneDNN is faster, by the committed table; bad shapes are left for `F.linear` to reject."""
    if not x.is_cpu or x.dtype != weight.dtype or not torch._C._get_mkldnn_enabled():
        return False
    if not x.is_contiguous() or not weight.is_contiguous():
        return False
    (rows, inner), (outer, columns) = x.shape, weight.shape
    if rows == 0 or inner != columns or not on_cpu.takes_onednn(x.dtype):
        return False
    return bias is None or (bias.shape == (outer,) and bias.dtype == x.dtype and bias.is_contiguous())


def _takes_kernel(a, b, bias=None) -> bool:
    """Whether the kernel is faster for a (M, K) @ b (K, N); bad shapes are left for PyTorch to reject."""
    (rows, inner), (length, columns) = a.shape, b.shape
    if not on_cpu.takes_product(a.dtype, rows, columns, inner) or not (a.is_cpu and b.is_cpu):
        return False
    if inner != length or a.dtype != b.dtype or 1 not in a.stride() or 1 not in b.stride():
        return False
    return bias is None or (bias.shape == (columns,) and bias.dtype == a.dtype and bias.is_contiguous())


def _can_be_packed(weight) -> bool:
    is_memory = type(weight) in (Tensor, torch.nn.Parameter) and weight.is_cpu and not weight.is_inference()
    return is_memory and on_cpu.takes_onednn(weight.dtype)


def _pack(weight) -> _Pack:
    source = weight.detach()
    return _Pack(weight, weight._version, source, torch.ops.mkldnn._reorder_linear_weight(source.contiguous()))


def _packed(weight):
    """The packed copy of ``weight``; None if there is none or it is stale."""
    pack = _packs.own.get(id(weight)) if _packs.own else None
    if pack is None or pack.version != weight._version or pack.source.data_ptr() != weight.data_ptr():
        return None
    return pack.packed
