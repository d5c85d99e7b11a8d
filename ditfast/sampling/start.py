"""The start of a sample, which depends on its seed alone, not on its batch, rank or device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Start(NamedTuple):
    label: int
    noise: torch.Tensor  # (C, S, S) float32, on the CPU
    generator: torch.Generator  # for the noise of the sampling steps, on their device


def draw_start(
    seed: int,
    shape: Sequence[int],
    num_classes: int,
    device: str | torch.device = "cpu",
    label: int | None = None,
) -> Start:
    """Draw a sample's label, unless given, and its noise, which does not depend on whether the label is given."""
    own: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
    drawn = int(torch.randint(num_classes, (), **own))
    noise = torch.randn(*shape, **own)
    # samplers draw on their own device, where a CPU generator does not work
    steps = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, (), **own)))
    return Start(drawn if label is None else label, noise, steps)
