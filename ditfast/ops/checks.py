"""Argument checks shared by the operations: one clear error that names the argument, the rule and the value.

Every call makes them: an argument that is as it should be costs one expression.
"""

import math
from numbers import Real

import torch

FLOATING = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def tensor(name: str, value, rule: str = "", shape: tuple[int, ...] | None = None, device=None) -> None:
    """``value`` is a floating-point tensor of that shape, which the rule spells in letters, on that device."""
    if (
        isinstance(value, torch.Tensor)
        and value.dtype in FLOATING
        and (device is None or value.device == device)
        and (shape is None or value.shape == shape)
    ):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of the first argument, {device}, got {value.device}")
    raise ValueError(f"{name} must have shape {rule} = {tuple(shape)}, got {tuple(value.shape)}")


def ranked(name: str, value, rule: str, dims: int, device=None) -> torch.Size:
    """``value`` is a floating-point tensor of so many dimensions; returns its shape."""
    tensor(name, value, device=device)
    shape = value.shape
    if len(shape) != dims:
        raise ValueError(f"{name} must have shape {rule}, got {tuple(shape)}")
    return shape


def weight(name: str, value, rule: str, columns: int, device) -> int:
    """``value`` is a Linear's weight with so many columns; returns how many rows it has."""
    shape = ranked(name, value, rule, 2, device)
    if shape[1] != columns:
        raise ValueError(f"{name} must have shape {rule} = {(shape[0], columns)}, got {tuple(shape)}")
    return shape[0]


def tokens(name: str, x) -> torch.Size:
    """``x`` is (B, N, D) with D >= 1; returns its shape."""
    shape = ranked(name, x, "(B, N, D)", 3)
    if shape[2] == 0:
        raise ValueError(f"{name} must have D >= 1, got shape {tuple(shape)}")
    return shape


def modulation(name: str, value, shape, device) -> None:
    """``value`` is (B, D), one row per sample of tokens (B, N, D), or (B, N, D), one row per token."""
    if isinstance(value, torch.Tensor) and value.dim() == 3:
        tensor(name, value, "(B, N, D)", shape, device)
    else:
        tensor(name, value, "(B, D)", (shape[0], shape[2]), device)


def residual(x, y, gate, bias):
    """x, y (B, N, D), gate (B, D) or (B, N, D), bias (D,) or None; returns the shape of x and its device."""
    shape, device = tokens("x", x), x.device
    tensor("y", y, "(B, N, D)", shape, device)
    modulation("gate", gate, shape, device)
    if bias is not None:
        tensor("bias", bias, "(D,)", shape[2:], device)
    return shape, device


def epsilon(value) -> None:
    """``value`` is a finite number of at least 0."""
    if type(value) is float and 0 <= value < math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {value!r}")


def factor(name: str, value) -> None:
    """``value`` is a finite number, or None."""
    if value is None or type(value) is float and -math.inf < value < math.inf:
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number or None, got {value!r}")


def positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
