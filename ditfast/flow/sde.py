"""Solvers of dx = drift dt + sqrt(2 w) dW, and the last step, which adds no noise."""

import math
from itertools import pairwise

import torch

from ditfast.diffusion.noise import noise_like
from ditfast.flow import paths

METHODS = ("Euler", "Heun")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Drift:
    """What a step needs at a time and a place, of one call of the model.

    Args:
        transport: see `Transport`.
        form, norm: of w, see `paths.DIFFUSION_FORMS`.
        call: called as call(t, x), t a number; the model's checked output.
    """

    def __init__(self, transport, form, norm, call):
        self.transport, self.form, self.norm, self.call = transport, form, norm, call

    def point(self, t, x) -> paths.Point:
        return self.transport.point(torch.full((len(x),), t, dtype=x.dtype, device=x.device), x)

    def diffusion(self, t, x):
        """w, in the shape of x but for ones: (B, 1, …)."""
        p = self.point(t, x)
        return paths.DIFFUSION_FORMS[self.form](torch.full_like(p.alpha, t), p, self.norm)

    def parts(self, t, x):
        """The velocity, the score and the drift, velocity + w score, at x."""
        p, output = self.point(t, x), self.call(t, x)
        velocity, score = self.transport.velocity(p, x, output), self.transport.score(p, x, output)
        return velocity, score, velocity + self.diffusion(t, x) * score


def steps(method: str, drift: Drift, x, times, generator=None):
    """Yield x after each step along ``times``, rising numbers.

    Source: Ma et al. 2024, section 2.4; "Heun" adds a step's noise first, as Karras et al. 2022, algorithm 2.
    """
    for start, end in pairwise(times):
        dt = end - start
        kick = torch.sqrt(2 * drift.diffusion(start, x)) * (noise_like(x, generator) * math.sqrt(dt))
        if method == "Euler":
            x = x + drift.parts(start, x)[2] * dt + kick
        else:
            noisy = x + kick
            first = drift.parts(start, noisy)[2]
            x = noisy + dt / 2 * (first + drift.parts(end, noisy + dt * first)[2])
        yield x


def last_step(kind, drift: Drift, x, t: float, size: float):
    """x at time t, taken to data: by ``size`` times the drift ("Mean") or the velocity ("Euler"), or its expectation.

    Source: Ma et al. 2024, section 2.4; the expectation, "Tweedie", Efron 2011.
    """
    if kind is None:
        return x
    velocity, score, mean = drift.parts(t, x)
    if kind == "Tweedie":
        return paths.data_from_score(drift.point(t, x), x, score)
    return x + size * (mean if kind == "Mean" else velocity)


def call_times(method: str, kind, times) -> list[float]:
    """When `steps` and then `last_step` call the model, call by call."""
    calls = [t for start, end in pairwise(times) for t in ((start,) if method == "Euler" else (start, end))]
    return calls + [times[-1]] * (kind is not None)
