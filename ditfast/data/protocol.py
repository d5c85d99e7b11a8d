"""The interface of training data."""

from typing import Any, Protocol

import torch


class Source(Protocol):
    """A data set.

    Attributes:
        shape: (C, H, W) of a sample: pixels in [-1, 1], or scaled latents.
        num_classes: number of classes.
        classes: their names, by label.
        count: samples per epoch; None for endless data, where sample i is generated from its index.
        identity: description of the data as JSON values. Checkpoints record it, and a run refuses other data.
    """

    shape: tuple[int, int, int]
    num_classes: int
    classes: list[str]
    identity: dict[str, Any]

    @property
    def count(self) -> int | None: ...

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Sample ``index``, float32 (C, H, W), and its label.

        All randomness, such as a flip or the noise of a latent, comes from ``generator``.

        Raises:
            Unreadable: the item is broken.
        """
        ...
