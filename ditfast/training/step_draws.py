"""Random draws of a step, which depend only on seed and step, not on the number of ranks."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ditfast.seeds import STEP, derive_seed


class StepDraws(NamedTuple):
    """Random draws for a batch or part of one."""

    times: tuple[torch.Tensor, ...]  # (b,) each, drawn by the objective
    noise: torch.Tensor  # (b, C, H, W)
    dropped: torch.Tensor  # (b,) bool: use the null label

    def part(self, index: slice) -> "StepDraws":
        return StepDraws(tuple(t[index] for t in self.times), self.noise[index], self.dropped[index])


def draw_step(
    seed: int,
    step: int,
    batch: int,
    shape: tuple[int, int, int],
    draw_times: Callable[..., tuple[torch.Tensor, ...]],
    label_drop: float,
    device: str | torch.device,
) -> StepDraws:
    """Draw on the device for the whole batch of a step.

    Every rank draws for the whole batch and uses its part, so no rank has a random state to save.

    Args:
        batch: samples over all ranks.
        shape: (C, H, W) of a model input.
        draw_times: see `Objective`.
        label_drop: probability of the null label.
    """
    generator = torch.Generator(device).manual_seed(derive_seed(seed, STEP, step))
    times = draw_times(batch, device, generator)
    noise = torch.randn(batch, *shape, generator=generator, device=device)
    return StepDraws(times, noise, torch.rand(batch, generator=generator, device=device) < label_drop)
