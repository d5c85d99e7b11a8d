"""Addresses of tensors for C++, which trusts them.

Each tensor is compared with what the kernel will read or overwrite, so that a mistake in Python raises an error
instead of corrupting memory. A zero tensor, or a parameter whose memory FSDP has freed, has no address. A valid
tensor costs one expression.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def contiguous(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The address of a contiguous tensor on the CPU."""
    if t.is_contiguous() and t.is_cpu and t.dtype is dtype and t.shape == shape and (address := t.data_ptr()):
        return address
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {tuple(t.shape)} and strides {t.stride()}")
    return strided(name, t, dtype, shape)


def with_unit_stride(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The address of a tensor on the CPU whose last dimension has stride 1."""
    if t.stride(-1) == 1 and t.is_cpu and t.dtype is dtype and t.shape == shape and (address := t.data_ptr()):
        return address
    if t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
        raise ValueError(f"{name} must have unit stride in its last dimension, got strides {t.stride()}")
    return strided(name, t, dtype, shape)


def strided(name: str, t: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The address of a tensor on the CPU with any strides."""
    if t.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if not t.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {t.device}")
    address = t.data_ptr()
    if not address and t.numel():
        raise ValueError(f"{name} must have memory, got a tensor of shape {tuple(t.shape)} without")
    return address


def matrix(name: str, t: Tensor, shape: Sequence[int]) -> int:
    """The address of a float32 matrix on the CPU, one of whose strides is 1."""
    if 1 not in t.stride():
        raise ValueError(f"{name} must have a stride of 1, got strides {t.stride()}")
    return strided(name, t, torch.float32, shape)


def contiguous_or_null(name: str, t: Tensor | None, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """`contiguous`; 0 for None."""
    return 0 if t is None else contiguous(name, t, dtype, shape)


def address_or_null(t: Tensor | None) -> int:
    """The address of an output that the caller has allocated; 0 for None."""
    return 0 if t is None else t.data_ptr()
