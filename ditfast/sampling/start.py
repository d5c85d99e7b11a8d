"""What a sample starts from. It follows from the sample's seed alone, not from its batch, rank or device."""

from typing import NamedTuple

import torch


class Start(NamedTuple):
    label: int
    noise: torch.Tensor  # (C, S, S) float32, on the CPU
    generator: torch.Generator  # of the noise of its steps, on the device that takes them


def draw_start(seed: int, shape, num_classes: int, device="cpu", label: int | None = None) -> Start:
    """A sample's label, drawn unless given, and its noise, which is the same whether or not the label is given."""
    own = torch.Generator().manual_seed(seed)
    here = {"generator": own, "device": "cpu"}
    drawn = int(torch.randint(num_classes, (), **here))
    noise = torch.randn(*shape, **here)
    # samplers draw where they compute, where a generator of the CPU cannot serve
    steps = torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, (), **here)))
    return Start(drawn if label is None else label, noise, steps)
