"""Which times to train on."""

import torch

from ditfast.flow import checks

SAMPLINGS = ("uniform", "logit-normal")


class TimeSampling:
    """Times in [0, 1], 0 noise and 1 data: uniform, or the sigmoid of a normal.

    Args:
        kind: one of `SAMPLINGS`.
        mean, std: of the normal. A mean above 0 trains more on what is almost data.
        shift: see `shift_times`.

    Raises:
        ValueError: naming the argument.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (logit-normal).
    """

    def __init__(self, kind="uniform", mean=0.0, std=1.0, shift=1.0):
        checks.choice("time_sampling", kind, SAMPLINGS)
        checks.number("time_mean", mean, -100, 100)
        checks.number("time_std", std, 0, 100)
        checks.number("time_shift", shift, 1e-3, 1e3)
        self.kind, self.mean, self.std, self.shift = kind, mean, std, shift

    def draw(self, count: int, device, generator=None, low=0.0, high=1.0):
        """(B,) float32; uniform ones in [low, high), others moved into it."""
        here = {"device": device, "generator": generator}
        if self.kind == "uniform":
            t = torch.rand(count, **here)
        else:
            t = torch.sigmoid(self.mean + self.std * torch.randn(count, **here))
        return shift_times(t, self.shift) * (high - low) + low


def shift_times(t, shift: float):
    """Times with more of them near noise, as larger images need: noise level s to shift * s / (1 + (shift - 1) * s).

    Source: Esser et al. 2024, equation 23, where the noise level is 1 - t.
    """
    return t if shift == 1 else t / (shift - (shift - 1) * t)
