"""Sampling of training times."""

from typing import Any, Literal

import torch

from ditfast.flow import checks

SAMPLINGS = ("uniform", "logit-normal")
TimeDistribution = Literal["uniform", "logit-normal"]


class TimeSampling:
    """Times in [0, 1], from 0, noise, to 1, data: uniform, or the sigmoid of a normal.

    Args:
        kind: one of `SAMPLINGS`.
        mean, std: of the normal. A mean above 0 favors times near data.
        shift: see `shift_times`.

    Raises:
        ValueError: naming the argument.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (logit-normal).
    """

    def __init__(self, kind: TimeDistribution = "uniform", mean: float = 0.0, std: float = 1.0, shift: float = 1.0):
        checks.choice("time_sampling", kind, SAMPLINGS)
        checks.number("time_mean", mean, -100, 100)
        checks.number("time_std", std, 0, 100)
        checks.number("time_shift", shift, 1e-3, 1e3)
        self.kind, self.mean, self.std, self.shift = kind, mean, std, shift

    def draw(
        self,
        count: int,
        device: str | torch.device,
        generator: torch.Generator | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> torch.Tensor:
        """Draw times (B,), float32, rescaled from [0, 1] to [low, high]."""
        here: dict[str, Any] = {"device": device, "generator": generator}
        if self.kind == "uniform":
            t = torch.rand(count, **here)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(count, **here))
        return shift_times(t, self.shift) * (high - low) + low


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Shift times toward noise, for larger images: noise level s becomes shift * s / (1 + (shift - 1) * s).

    Source: Esser et al. 2024, equation 23, where the noise level is 1 - t.
    """
    return t if shift == 1 else t / (shift - (shift - 1) * t)
