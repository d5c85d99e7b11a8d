"""Image preprocessing for training, as applied to ImageNet in the Diffusion Transformers paper."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ditfast.optional import import_optional

if TYPE_CHECKING:
    from PIL.Image import Image


def center_crop(image: "Image", size: int) -> "Image":
    """Scale the shorter side of an image to ``size`` and crop the center, size x size.

    The image is halved by 2 x 2 averaging while its shorter side is at least twice the size, then resampled
    bicubically, since bicubic alone would alias. Source: Dhariwal and Nichol 2021, "Diffusion models beat GANs on
    image synthesis" (their released code), whose ImageNet statistics were computed this way.
    """
    resampling = import_optional("PIL.Image").Resampling
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: "Image") -> torch.Tensor:
    """Convert a gray or RGB image to float32 (1 or 3, H, W), mapping 0 to -1 and 255 to 1."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.float().div(127.5).sub(1).contiguous()
