"""From samples to pixels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ditfast.sampling.autoencoder import Scaling, scaling_of

# samples (B, C, S, S) to images in [-1, 1], (B, 1 or 3, factor * S, factor * S)
Decoder = Callable[[torch.Tensor], torch.Tensor]


class Takes(NamedTuple):
    """The samples that a decoder takes."""

    channels: tuple[int, ...]  # the values that C may have
    factor: int  # pixels per element of a sample, per side


PIXELS = Takes((1, 3), 1)


def keep_pixels(x: torch.Tensor) -> torch.Tensor:
    """The decoder for models of pixels."""
    return x


def make_decoder(vae: Any, scaling: Scaling | None = None) -> Decoder:
    """The decoder for models of an AutoencoderKL's latents; ``scaling`` defaults to its config's."""
    vae.enable_slicing()  # one image at a time: bounded memory, and the same image in any batch
    scaling = scaling or scaling_of(vae)
    return lambda x: vae.decode(scaling.undo(x)).sample


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Convert images in [-1, 1], (B, 1 or 3, Hh, Ww), to a uint8 array (B, Hh, Ww, 3), truncating as the original."""
    pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
