"""From samples to pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ditfast.optional import import_optional
from ditfast.sampling import SampleError

PUBLISHED_VAES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}
LATENT_SCALE = 0.18215  # what the latents were multiplied with for training


class Decoder(NamedTuple):
    decode: Callable  # samples (B, C, S, S) to images in [-1, 1], (B, 1 or 3, factor * S, factor * S)
    channels: tuple[int, ...]  # what C can be
    factor: int


def make_decoder(kind: str, vae: str, device) -> Decoder:
    """The decoder of models of ``kind`` "pixel" or "vae"; then ``vae`` is ema, mse, or the folder of another.

    Raises:
        SampleError: no such autoencoder, or diffusers is missing.
    """
    if kind == "pixel":
        return Decoder(lambda x: x, (1, 3), 1)
    autoencoder = load_vae(vae, device)
    autoencoder.enable_slicing()  # an image at a time: bounded memory, and the same image in any batch
    channels = (autoencoder.config.latent_channels,)
    return Decoder(lambda x: autoencoder.decode(x / LATENT_SCALE).sample, channels, vae_factor(autoencoder))


def load_vae(name: str, device):
    """A frozen AutoencoderKL: ema, mse, or that of a folder.

    Raises:
        SampleError: there is none, or diffusers is missing.
    """
    if name not in PUBLISHED_VAES and not Path(name).is_dir():
        raise SampleError(f"--vae must be ema, mse or a folder, got {name!r}")
    try:
        vae = import_optional("diffusers").AutoencoderKL.from_pretrained(PUBLISHED_VAES.get(name, name))
    except (ImportError, OSError, ValueError) as error:
        raise SampleError(f"--vae {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return vae.to(device).eval().requires_grad_(False)


def vae_factor(vae) -> int:
    """How many times smaller than an image its latent is, in height and width."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def to_uint8(images: torch.Tensor):
    """Images in [-1, 1], (B, 1 or 3, Hh, Ww), as a uint8 array (B, Hh, Ww, 3), truncated as in the original."""
    pixels = (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
