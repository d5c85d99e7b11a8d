"""Argument checks. Each error names the argument, the rule and the value; none of them reads tensor values."""

from numbers import Integral, Real

import torch

from ditfast.dense import dense


def floating(name: str, value: object) -> None:
    """Check that ``value`` is a floating-point tensor with a batch dimension."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {value.dtype}")
    dense(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have shape (B, …), got ()")


def timesteps(t: object, x: torch.Tensor) -> None:
    """Check that ``t`` is an integer tensor (B,) on the device of x (B, …)."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"t must be a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t must be int64 or int32, got {t.dtype}")
    dense("t", t)
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"t must have shape (B,) = ({x.shape[0]},), got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"t must be on the device of x, {x.device}, got {t.device}")


def like(name: str, value: torch.Tensor, of: str, x: torch.Tensor) -> None:
    """Check that ``value`` is a floating-point tensor with the shape and device of x, the argument named ``of``."""
    floating(name, value)
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {of}, {tuple(x.shape)}, got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {value.device}")


def eta(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"eta must be in [0, 1], got {value!r}")


def model_output(output: object, x: torch.Tensor, learned_variance: bool) -> None:
    """Check that ``output`` is (B, C, …) like x, or (B, 2C, …) if the model also predicts a variance."""
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"the model must return a tensor or a pair that starts with one, got {type(output).__name__}")
    channels = x.shape[1] * (2 if learned_variance else 1)
    expected = (x.shape[0], channels, *x.shape[2:])
    if tuple(output.shape) != expected:
        rule = (
            "twice the channels of x, for learn_sigma=True"
            if learned_variance
            else "the shape of x, for learn_sigma=False"
        )
        raise ValueError(f"the model's output must have {rule}: {expected}, got {tuple(output.shape)}")


def sample_shape(value: object) -> None:
    """Check that ``value`` is (B, C, …), non-negative integers."""
    sizes = value if isinstance(value, (tuple, list)) else ()
    if len(sizes) < 2 or not all(isinstance(each, Integral) and int(each) >= 0 for each in sizes):
        raise ValueError(f"shape must be (B, C, …), non-negative integers, got {value!r}")
