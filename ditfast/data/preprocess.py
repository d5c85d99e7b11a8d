"""From an image to the pixels of a sample, as the Diffusion Transformers' paper prepares ImageNet."""

import numpy as np
import torch

from ditfast.optional import import_optional


def center_crop(image, size: int):
    """The middle of a Pillow image, size x size, with its smaller side fitted to it.

    The image is halved by averages of 2 x 2 while its smaller side is at least twice the size, and resampled by a
    bicubic for the rest: bicubic alone would alias. As in Dhariwal and Nichol 2021, "Diffusion models beat GANs on
    image synthesis" (their released code), whose statistics of ImageNet are made this way.
    """
    resampling = import_optional("PIL.Image").Resampling
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image) -> torch.Tensor:
    """A grey or RGB Pillow image as float32 (1 or 3, H, W): 0 is -1, 255 is 1."""
    pixels = torch.from_numpy(np.array(image))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels.float().div(127.5).sub(1).contiguous()
