"""What a step draws at random: it follows from the seed and the step alone, on any number of ranks."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ditfast.seeds import STEP, derive_seed


class StepDraws(NamedTuple):
    times: tuple[torch.Tensor, ...]  # (b,) each: what the objective draws
    noise: torch.Tensor  # (b, C, H, W)
    dropped: torch.Tensor  # (b,) whether the null label takes the label's place

    def part(self, index: slice) -> "StepDraws":
        return StepDraws(tuple(t[index] for t in self.times), self.noise[index], self.dropped[index])


def draw_step(seed: int, step: int, batch: int, shape, draw_times: Callable, label_drop: float, device) -> StepDraws:
    """A step's draws for the whole batch, made on the device; a rank takes its part of them.

    Args:
        draw_times: see `Objective`.

    Every rank makes all of them and uses its part, so that no rank has a state of its own to be kept.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, STEP, step))
    here = {"generator": generator, "device": device}
    times = draw_times(batch, device, generator)
    noise = torch.randn(batch, *shape, **here)
    return StepDraws(times, noise, torch.rand(batch, **here) < label_drop)
