"""What the operations over token rows (B, N, D) share: autocast and the limits of their kernels."""

import torch

from ditfast.ops import backend
from ditfast.ops.backend import DTYPES


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would cast ``x`` for a Linear."""
    device = x.device.type
    possible = x.dtype != torch.float64 and torch.amp.is_autocast_available(device)
    return possible and torch.is_autocast_enabled(device)


def linear_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a Linear will read a tensor like ``x``: autocast's, where it is on."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def choose(op: str, requested, x, y, bias, *modulation) -> str:
    """The backend of a call. One row per token goes to the reference, unless the call names another."""
    if not isinstance(requested, str) and any(m.dim() == 3 for m in modulation):
        return "reference"
    return backend.choose(op, requested, x.device.type, _unsupported(x, y, bias, *modulation))


def _unsupported(x: torch.Tensor, y: torch.Tensor | None, bias: torch.Tensor | None, *modulation) -> str | None:
    """Why the row kernels cannot take these tensors; None if they can."""
    d = x.shape[-1]
    if any(m.dim() == 3 for m in modulation):
        return "modulation of shape (B, N, D), one row per token, has no kernel"
    if d % 8 != 0 or d > 8192:
        return f"the kernels need D to be a multiple of 8, at most 8192, got {d}"
    for t in (x, y, bias, *modulation):
        if t is not None and t.dtype not in DTYPES:
            return f"the kernels take float32, float16 and bfloat16, got {t.dtype}"
    return None
