"""Classifier-free guidance of a model's predictions. Source: Peebles & Xie, section 3.1."""

from typing import Any

import torch
from torch import Tensor

from ditfast.models.limits import check_number, check_tensors


def check_guidance(
    model: Any, x: Tensor, cfg_scale: float | Tensor, cfg_channels: int | None
) -> tuple[Tensor, float | Tensor, int]:
    """Check arguments of `DiT.forward_with_cfg`.

    Returns:
        The half of x that is read, (B, C, S, S); the scale, a number or a tensor that broadcasts over a half; the
        channels to guide.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """
    check_tensors(x=x)
    if x.dim() == 0 or x.shape[0] % 2:
        raise ValueError(f"x must have an even batch for guidance, got shape {tuple(x.shape)}")
    if cfg_channels is None:
        cfg_channels = default_cfg_channels(model.in_channels)
    half = x[: x.shape[0] // 2]
    cfg_scale = _per_sample(cfg_scale, half)
    if not isinstance(cfg_channels, int) or not 0 <= cfg_channels <= model.out_channels:
        raise ValueError(f"cfg_channels must be in [0, {model.out_channels}], got {cfg_channels!r}")
    return half, cfg_scale, cfg_channels


def guide(out: Tensor, cfg_scale: float | Tensor, cfg_channels: int) -> Tensor:
    """Guide the leading channels of predictions (2B, C_out, S, S), whose second half is unconditional.

    ``cfg_scale`` is that of `check_guidance`.
    """
    guided, rest = out[:, :cfg_channels], out[:, cfg_channels:]
    cond, uncond = guided.chunk(2)
    guided = (uncond + cfg_scale * (cond - uncond)).to(out.dtype)  # (B, cfg_channels, S, S)
    return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def default_cfg_channels(in_channels: int) -> int:
    """How many channels guidance acts on: 3 of 4, as in the released samples, else all."""
    return 3 if in_channels == 4 else in_channels


def _per_sample(scale, half):
    """A scale per sample as (B, 1, 1, 1): (B,) would broadcast over the width. A number and () stay as they are."""
    if not isinstance(scale, Tensor):
        check_number("cfg_scale", scale)
        return scale
    check_tensors(cfg_scale=scale)
    batch = half.shape[0]
    if scale.dim() not in (0, 1, 4) or scale.shape[1:].numel() != 1 or scale.dim() and scale.shape[0] != batch:
        raise ValueError(
            f"cfg_scale must be a number or have shape (), (B,) or (B, 1, 1, 1), B = {batch} the half of x's batch, "
            f"got {tuple(scale.shape)}"
        )
    if scale.is_complex():
        raise TypeError(f"cfg_scale must be real, got {scale.dtype}")
    if scale.dim() and scale.device != half.device:
        raise ValueError(f"cfg_scale must be on the device of x, {half.device}, got {scale.device}")
    return scale.reshape(-1, 1, 1, 1) if scale.dim() else scale
