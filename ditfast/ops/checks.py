"""Argument checks shared by the operations: one clear error that names the argument, the rule and the value.

They run on every call, so a valid argument costs a single expression.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ditfast.dense import dense
from ditfast.ops.autocast import autocasts

_STRIDED = torch.strided
FLOATING = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def tensor(
    name: str, value: Any, rule: str = "", shape: tuple[int, ...] | None = None, device: torch.device | None = None
) -> None:
    """Require a dense floating-point tensor of this shape, spelled in letters by the rule, on this device."""
    try:
        if (
            isinstance(value, Tensor)
            and value.dtype in FLOATING
            and value.layout is _STRIDED
            and (device is None or value.device == device)
            and (shape is None or value.shape == shape)
        ):
            return
    except RuntimeError:  # a nested tensor may be strided, but has no shape
        pass
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    dense(name, value)
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the first argument's device, {device}, got {value.device}")
    raise ValueError(f"{name} must have shape {rule} = {tuple(shape or ())}, got {tuple(value.shape)}")


def ranked(name: str, value: Any, rule: str, dims: int, device: torch.device | None = None) -> torch.Size:
    """Require a floating-point tensor with ``dims`` dimensions; return its shape."""
    tensor(name, value, device=device)
    try:
        shape = value.shape
    except RuntimeError:
        dense(name, value)
        raise
    if len(shape) != dims:
        raise ValueError(f"{name} must have shape {rule}, got {tuple(shape)}")
    return shape


def weight(name: str, value: Any, rule: str, columns: int, device: torch.device) -> int:
    """Require a Linear's weight with this many columns; return its number of rows."""
    shape = ranked(name, value, rule, 2, device)
    if shape[1] != columns:
        raise ValueError(f"{name} must have shape {rule} = {(shape[0], columns)}, got {tuple(shape)}")
    return shape[0]


def parameter_dtypes(name: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Require parameters of a Linear in the dtype of ``x``, its input, unless autocast casts both."""
    for key, value in parameters.items():
        if value is not None and value.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"{key} must have the dtype of {name}, {x.dtype}, outside autocast, got {value.dtype}")


def tokens(name: str, x: Any, least: int = 0) -> torch.Size:
    """Require (B, N, D) with D >= 1 and at least so many tokens; return the shape."""
    shape = ranked(name, x, "(B, N, D)", 3)
    if shape[2] == 0:
        raise ValueError(f"{name} must have D >= 1, got shape {tuple(shape)}")
    if shape[1] < least:
        raise ValueError(f"{name} must have N >= {least} tokens, got shape {tuple(shape)}")
    return shape


def modulation(name: str, value: Any, shape: torch.Size, device: torch.device) -> None:
    """Require (B, D), one row per sample of tokens (B, N, D), or (B, N, D), one row per token."""
    if isinstance(value, Tensor) and value.dim() == 3:
        rule = "(B, N, D)" if value.shape == shape else f"(B, D) = {(shape[0], shape[2])} or (B, N, D)"
        tensor(name, value, rule, shape, device)
    else:
        tensor(name, value, "(B, D)", (shape[0], shape[2]), device)


def residual(x: Tensor, y: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[torch.Size, torch.device]:
    """Require x, y (B, N, D), gate (B, D) or (B, N, D), bias (D,) or None; return the shape and device of x."""
    shape, device = tokens("x", x), x.device
    tensor("y", y, "(B, N, D)", shape, device)
    modulation("gate", gate, shape, device)
    if bias is not None:
        tensor("bias", bias, "(D,)", shape[2:], device)
    return shape, device


def epsilon(value: Any) -> None:
    """Require a finite number >= 0."""
    if type(value) is float and 0 <= value < math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {value!r}")


def factor(name: str, value: Any) -> None:
    """Require a finite number or None."""
    if value is None or type(value) is float and -math.inf < value < math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not -math.inf < float(value) < math.inf:
        raise ValueError(f"{name} must be a finite number or None, got {value!r}")


def positive(name: str, value: Any) -> None:
    """Require an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def heads(name: str, width: int, num_heads: Any, size: str = "last") -> int:
    """Require the width of q, k and v of all heads, 3*H*d; return d."""
    positive("num_heads", num_heads)
    if width == 0 or width % (3 * num_heads):
        raise ValueError(f"{name} must have a {size} size divisible by 3 * num_heads={3 * num_heads}, got {width}")
    return width // (3 * num_heads)
