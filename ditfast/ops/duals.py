"""Dual tensors: a value and its tangent."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad


def take_apart(op: str, names: Sequence[str], args: Sequence) -> tuple[list, list[Tensor | None]]:
    """The arguments without tangents, and for each that is a tensor or None, its tangent or None."""
    primals, tangents = [], []
    for name, a in zip(names, args, strict=True):
        primal = tangent = None
        if isinstance(a, Tensor):
            primal, tangent = forward_ad.unpack_dual(a)
            if tangent is not None and tangent.dtype != a.dtype:
                raise TypeError(f"{op}: the tangent of {name} must have its dtype, {a.dtype}, got {tangent.dtype}")
        primals.append(a if tangent is None else primal)
        if a is None or isinstance(a, Tensor):
            tangents.append(tangent)
    return primals, tangents


def put_together(outputs: Any, tangents: Sequence[Tensor]) -> Any:
    """Attach the tangents to the leading outputs."""
    if isinstance(outputs, Tensor):
        return forward_ad.make_dual(outputs, tangents[0])
    duals = [forward_ad.make_dual(*pair) for pair in zip(outputs, tangents, strict=False)]
    return *duals, *outputs[len(duals) :]
