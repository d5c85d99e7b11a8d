"""Limits of a `DiT`'s arguments, checked before a module is built: a config may come from an untrusted file."""

import math
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any

from torch import Tensor

from ditfast.dense import dense

POSITIONS = 2**28  # values in the position embedding, N * D, which is computed in float64
_WHOLE = {
    "patch_size": (1, 2**12),
    "in_channels": (1, 2**16),
    "hidden_size": (1, 2**17),
    "depth": (0, 2**10),
    "num_heads": (1, 2**17),
    "num_classes": (1, 2**26),
}
_REAL = {
    "mlp_ratio": (0, 2**10),
    "class_dropout_prob": (0, 1),
    "timestep_freq_shift": (-(2**10), 127),  # below the 128 frequencies
    "norm2_eps": (0, 1),
}
_POSITIVE = ("mlp_ratio", "norm2_eps")
_SIZE = (1, 2**16)  # of one side of the latent
_SWITCHES = ("learn_sigma", "recompute_mlp", "second_time")


def check_arguments(config: dict) -> None:
    """Reject arguments of `DiT` that are out of range; missing ones are not checked.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    for name, (low, high) in _WHOLE.items():
        if name in config:
            whole(name, config[name], low, high)
    for name, (low, high) in _REAL.items():
        if name in config:
            _real(name, config[name], low, high)
    for name in _SWITCHES:
        if config.get(name, True) not in (True, False):
            raise ValueError(f"{name} must be true or false, got {short(config[name])}")
    for name in ("conditioning", "backend"):
        if config.get(name) is not None and not isinstance(config[name], str):
            raise ValueError(f"{name} must be a string, got {short(config[name])}")
    if "input_size" in config:
        _check_size(config)
    if config.get("hidden_size", 4) % 4:
        raise ValueError(f"hidden_size must be a multiple of 4, got {config['hidden_size']}")
    if config.get("hidden_size", 0) % config.get("num_heads", 1):
        raise ValueError(f"num_heads must divide hidden_size={config['hidden_size']}, got {config['num_heads']}")
    if not 1 <= config.get("hidden_size", 1) * config.get("mlp_ratio", 1) <= 2**20:
        raise ValueError(
            f"mlp_ratio must give the MLP a width in [1, {2**20}], got {config['mlp_ratio']} of "
            f"hidden_size={config.get('hidden_size')}"
        )


def check_tensors(**values: object) -> None:
    """Require dense tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        dense(name, value)


def check_number(name: str, value: Any) -> None:
    """Require a finite number."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not abs(value) < math.inf:  # torch.compile traces it
        raise ValueError(f"{name} must be a finite number, got {short(value)}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Require an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= high:
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {short(value)}")


def _real(name, value, low, high):
    known = isinstance(value, Real) and not isinstance(value, bool)
    if not known or not low <= value <= high or (value == 0 and name in _POSITIVE):
        bracket = "(" if name in _POSITIVE else "["
        raise ValueError(f"{name} must be a number in {bracket}{low}, {high}], got {short(value)}")


def _check_size(config):
    size, patch = config["input_size"], config.get("patch_size", 1)
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"input_size must be one integer or two, got {short(size)}")
    for side in sides:
        whole("input_size", side, *_SIZE)
    if any(side % patch for side in sides):
        raise ValueError(f"patch_size must divide input_size={size}, got {patch}")
    tokens, dim = math.prod(side // patch for side in sides), config.get("hidden_size", 1)
    if tokens * dim > POSITIONS:
        raise ValueError(
            f"input_size={size} with patch_size={patch} makes {tokens} tokens of hidden_size={dim}: "
            f"more than {POSITIONS} values"
        )
