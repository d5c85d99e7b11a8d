"""Strides of tensors: their names as kernel arguments, and the one that kernels assume.

A stride is in elements and is named after its tensor and dimension:

    x_b        from one sample of x to the next, batch
    x_n        from one token of a sample to the next
    x_c        from one channel of an image to the next
    x_h, x_w   from one pixel of an image to the one below it, to the one on its right
    x_j        from one element of a patch to the next
    x_m        from one row of a matrix to the next

A dimension without such an argument is dense: the last dimension of token tensors has stride 1 (`unit_stride`), and
outputs, which the launchers allocate, are contiguous.
"""

import torch


def unit_stride(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` with unit stride in its last dimension, copied only if necessary. None stays None."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def leading_strides(t: torch.Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first ``count`` dimensions; zeros for None, which a kernel never reads."""
    return (0,) * count if t is None else t.stride()[:count]
