"""Argument checks. Each error names the argument, the rule and the value."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch

from ditfast.dense import dense
from ditfast.suggest import did_you_mean

MOST = 10**6  # steps; each calls the model


def choice(name: str, value: object, known: Iterable[str | None]) -> None:
    """Check that ``value`` is one of ``known``, which may include None."""
    if value not in [*known]:
        names = ", ".join(map(str, known))
        raise ValueError(f"{name} must be one of {names}, got {value!r}{did_you_mean(value, [*filter(None, known)])}")


def number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Check that ``value`` is a finite number in [low, high]."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not low <= value <= high:
        rule = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def integer(name: str, value: int, low: int) -> None:
    """Check that ``value`` is an integer in [low, MOST]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= MOST:
        raise ValueError(f"{name} must be an integer in [{low}, {MOST}], got {value!r}")


def times(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """Check that ``t`` is a floating-point tensor (B,) in [0, 1], on the device of x (B, …).

    Values on a GPU are not read.
    """
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating-point, got {t.dtype}")
    dense(name, t)
    if tuple(t.shape) != (x.shape[0],):
        raise ValueError(f"{name} must have shape (B,) = ({x.shape[0]},), got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x1, {x.device}, got {t.device}")
    if is_readable(t) and not ((t >= 0) & (t <= 1)).all():
        raise ValueError(f"{name} must be in [0, 1], got values from {t.min():g} to {t.max():g}")


def is_readable(t: torch.Tensor) -> bool:
    """Whether its values can be read without synchronizing with a device or breaking a trace."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return t.device.type == "cpu"


def model_output(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Check the model's output and return its prediction, (B, C, …) like x, in float32 or better.

    The second half of the channels of a model with learn_sigma=True is dropped: flows have no variance to learn.
    """
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"the model must return a tensor, got {type(output).__name__}")
    single, double = (x.shape[0], x.shape[1], *x.shape[2:]), (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if tuple(output.shape) not in (single, double):
        raise ValueError(
            f"the model's output must have the shape of x or twice its channels: {single} or {double}, "
            f"got {tuple(output.shape)}"
        )
    return output[:, : x.shape[1]].to(torch.promote_types(output.dtype, torch.float32))
