"""Argument checks shared by the operations: one clear error that names the argument, the rule and the value."""

import torch

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensor(name: str, value, like: torch.Tensor | None = None) -> None:
    """``value`` is a floating-point tensor, on the device of ``like``."""
    if isinstance(value, torch.Tensor) and value.dtype in FLOATING and (like is None or value.device == like.device):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}")
    raise ValueError(f"{name} must be on the device of the first argument, {like.device}, got {value.device}")


def shape(name: str, value: torch.Tensor, rule: str, expected: tuple[int, ...]) -> None:
    """``value`` has the shape ``expected``, which the rule spells in letters, as in "(B, D)"."""
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {rule} = {tuple(expected)}, got {tuple(value.shape)}")


def rank(name: str, value: torch.Tensor, rule: str, dims: int) -> None:
    if value.dim() != dims:
        raise ValueError(f"{name} must have shape {rule}, got {tuple(value.shape)}")


def tokens(name: str, x: torch.Tensor) -> None:
    """``x`` is (B, N, D) with D >= 1."""
    tensor(name, x)
    rank(name, x, "(B, N, D)", 3)
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have D >= 1, got shape {tuple(x.shape)}")


def modulation(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """``value`` is (B, D), one row per sample of x (B, N, D), or (B, N, D), one row per token."""
    tensor(name, value, x)
    if value.dim() == 3:
        shape(name, value, "(B, N, D)", x.shape)
    else:
        shape(name, value, "(B, D)", (x.shape[0], x.shape[2]))


def residual(x, y, gate, bias) -> None:
    """x, y (B, N, D), gate (B, D) or (B, N, D), bias (D,) or None."""
    tokens("x", x)
    tensor("y", y, x)
    shape("y", y, "(B, N, D)", tuple(x.shape))
    modulation("gate", gate, x)
    if bias is not None:
        tensor("bias", bias, x)
        shape("bias", bias, "(D,)", (x.shape[-1],))


def positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
