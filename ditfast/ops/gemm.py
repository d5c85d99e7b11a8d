"""Linears on the CPU by oneDNN, where that is faster than `F.linear`; and on weights that are packed for it.

With a bias in bfloat16 `F.linear` asks oneDNN to add to what is already there; what is here does not. Packed weights
lie as oneDNN reads them, and are a copy: `packed` says in which block of code there is one.
"""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ditfast.ops.autocast import autocasts, linear_dtype
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.per_thread import PerThread, setting
from ditfast.ops.registration import is_intercepted, is_tracked


class _Pack(NamedTuple):
    weight: torch.Tensor
    version: int
    source: torch.Tensor  # on the weight's memory, which no other takes while this holds it
    packed: torch.Tensor


_packs = PerThread("packs", {})  # id of a weight -> _Pack


def linear(x, weight, bias=None):
    """x (M, I) @ weight (O, I).T + bias (O,) or None: (M, O). Below autograd, on tensors that are just memory."""
    return _onednn(x, weight, bias) if _takes_onednn(x, weight, bias) else F.linear(x, weight, bias)


def linear_on_packed(x, weight, bias=None):
    """`linear`, on the packed copy of ``weight`` if there is one."""
    packed = _packed(weight)
    is_packed = packed is not None and _takes_onednn(x, weight, bias)
    return _onednn(x, packed, bias) if is_packed else linear(x, weight, bias)


def linear_for_inference(x, weight, bias, backends):
    """`F.linear`, as `linear_on_packed` where that may be: for eager tensors without derivatives, on no reference.

    Under autocast that is where weight and bias are in its dtype already.
    """
    tensors = x, weight, bias
    if torch.compiler.is_compiling() or not x.is_cpu or not on_cpu.takes_onednn(weight.dtype):
        return F.linear(*tensors)
    if is_tracked(tensors) or is_intercepted(tensors):
        return F.linear(*tensors)
    if autocasts(x):
        if any(t is not None and t.dtype != linear_dtype(x) for t in (weight, bias)):
            return F.linear(*tensors)
        x = x.to(weight.dtype)
    if next((name for name in backends if name in ("auto", "host", "reference")), None) == "reference":
        return F.linear(*tensors)
    return linear_on_packed(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


@contextmanager
def packed(weights: Iterable[torch.Tensor]):
    """Inside the ``with`` block, in this thread, `linear_on_packed` takes packed copies of these weights (O, I).

    A weight whose memory is written to or replaced meanwhile is taken as it is, without a copy.
    """
    mine = {id(weight): _pack(weight) for weight in weights if _can_be_packed(weight)}
    with setting(_packs, _packs.own | mine):
        yield


def _onednn(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes_onednn(x, weight, bias=None) -> bool:
    """Whether oneDNN itself is the faster, by the committed table; what does not fit is `F.linear`'s to refuse."""
    if not x.is_cpu or x.dtype != weight.dtype or not torch._C._get_mkldnn_enabled():
        return False
    if not x.is_contiguous() or not weight.is_contiguous():
        return False
    (rows, inner), (outer, columns) = x.shape, weight.shape
    if rows == 0 or inner != columns or not on_cpu.takes_onednn(x.dtype):
        return False
    return bias is None or (bias.shape == (outer,) and bias.dtype == x.dtype and bias.is_contiguous())


def _can_be_packed(weight) -> bool:
    is_memory = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_cpu and not weight.is_inference()
    return is_memory and on_cpu.takes_onednn(weight.dtype)


def _pack(weight) -> _Pack:
    source = weight.detach()
    return _Pack(weight, weight._version, source, torch.ops.mkldnn._reorder_linear_weight(source.contiguous()))


def _packed(weight):
    """The packed copy of ``weight``; None where there is none, or it is of an earlier value."""
    pack = _packs.own.get(id(weight)) if _packs.own else None
    if pack is None or pack.version != weight._version or pack.source.data_ptr() != weight.data_ptr():
        return None
    return pack.packed
