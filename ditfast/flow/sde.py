"""Solvers of dx = drift dt + sqrt(2 w) dW, and the last step, which adds no noise."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from ditfast.diffusion.noise import Generators, noise_like
from ditfast.flow import paths
from ditfast.flow.transport import Transport

METHODS = ("Euler", "Heun")
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Drift:
    """The terms of a step at (t, x), from one model call.

    Args:
        transport: the flow.
        form, norm: of w, see `paths.DIFFUSION_FORMS`.
        call: the model's checked output, as a function of t and x.
    """

    def __init__(
        self,
        transport: Transport,
        form: str,
        norm: float,
        call: Callable[[float, torch.Tensor], torch.Tensor],
    ):
        self.transport, self.form, self.norm, self.call = transport, form, norm, call

    def point(self, t: float, x: torch.Tensor) -> paths.Point:
        return self.transport.point(torch.full((len(x),), t, dtype=x.dtype, device=x.device), x)

    def diffusion(self, t: float, x: torch.Tensor) -> torch.Tensor:
        """w, (B, 1, …), which broadcasts with x."""
        p = self.point(t, x)
        return paths.DIFFUSION_FORMS[self.form](torch.full_like(p.alpha, t), p, self.norm)

    def parts(self, t: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The velocity, the score and the drift, velocity + w score, at (t, x)."""
        p, output = self.point(t, x), self.call(t, x)
        velocity, score = self.transport.velocity(p, x, output), self.transport.score(p, x, output)
        return velocity, score, velocity + self.diffusion(t, x) * score


def steps(
    method: str, drift: Drift, x: torch.Tensor, times: Sequence[float], generator: Generators = None
) -> Iterator[torch.Tensor]:
    """Yield x after each step along the increasing ``times``.

    Source: Ma et al. 2024, section 2.4; "Heun" adds a step's noise first, as in Karras et al. 2022, algorithm 2.
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


def last_step(kind: str | None, drift: Drift, x: torch.Tensor, t: float, size: float) -> torch.Tensor:
    """Take x from time t to data.

    Args:
        kind: add ``size`` times the drift ("Mean") or the velocity ("Euler"), or return the expected data
            ("Tweedie"); None returns x.

    Source: Ma et al. 2024, section 2.4; "Tweedie": Efron 2011.
    """
    if kind is None:
        return x
    velocity, score, mean = drift.parts(t, x)
    if kind == "Tweedie":
        return paths.data_from_score(drift.point(t, x), x, score)
    return x + size * (mean if kind == "Mean" else velocity)


def call_times(method: str, kind: str | None, times: Sequence[float]) -> list[float]:
    """The time of each model call of `steps`, then `last_step`."""
    calls = [t for start, end in pairwise(times) for t in ((start,) if method == "Euler" else (start, end))]
    return calls + [times[-1]] * (kind is not None)
