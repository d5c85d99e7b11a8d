"""What a step draws at random: it follows from the seed and the step alone, on any number of ranks."""

from typing import NamedTuple

import torch

from ditfast.seeds import STEP, derive_seed


class StepDraws(NamedTuple):
    t: torch.Tensor  # (b,) timesteps, uniform
    noise: torch.Tensor  # (b, C, H, W)
    dropped: torch.Tensor  # (b,) whether the null label takes the label's place

    def part(self, index: slice) -> "StepDraws":
        return StepDraws(*(value[index] for value in self))


def draw_step(seed: int, step: int, batch: int, shape, num_timesteps: int, label_drop: float, device) -> StepDraws:
    """A step's draws for the whole batch, made on the device; a rank takes its part of them.

    Every rank makes all of them and uses its part, so that no rank has a state of its own to be kept.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, STEP, step))
    here = {"generator": generator, "device": device}
    t = torch.randint(num_timesteps, (batch,), **here)
    noise = torch.randn(batch, *shape, **here)
    return StepDraws(t, noise, torch.rand(batch, **here) < label_drop)
