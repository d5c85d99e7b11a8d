"""Model inputs from data: the samples themselves, or latents encoded on the fly in every step."""

from typing import Any

import torch

from ditfast.command import by_option
from ditfast.counted import counted
from ditfast.data import Source
from ditfast.fingerprint import fingerprint
from ditfast.ranks import Ranks
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import Scaling, describe_vae, load_vae, vae_factor
from ditfast.seeds import ENCODE, derive_seed
from ditfast.training import TrainError

ENCODED_AT_ONCE = 16  # an autoencoder's activations are large: 34 MB per image and tensor at 256²


class Encoder:
    """Converts samples of the data to model inputs, and model outputs to images.

    Args:
        name: an AutoencoderKL: ema, mse or a folder; None to feed the samples to the model as they are.
        source: the data. If it holds latents already, the autoencoder only decodes.
        seed, batch: of the run.

    Attributes:
        shape: (C, H, W) of a model input.
        encodes: whether samples are encoded in every step.
        pixels: whether the model works on pixels.
        vae: the latents' autoencoder, as described by `ditfast.checkpoints.sampling`; None for pixels.

    Raises:
        TrainError: the autoencoder does not exist or does not match the data.
    """

    def __init__(self, name: str | None, source: Source, seed: int, batch: int, ranks: Ranks):
        self.shape: tuple[int, int, int] = source.shape
        self._seed, self._batch, self._ranks = seed, batch, ranks
        latents = source.identity["kind"] == "latents"
        self.encodes = name is not None and not latents
        self.pixels = name is None and not latents
        self.vae: dict[str, Any] | None = source.vae if latents else None  # type: ignore[attr-defined]  # Latents'
        self._vae: Any = None if name is None else _load(name, ranks.device)
        if self._vae is not None:
            if latents and fingerprint(self._vae) != source.identity["vae_checksum"]:
                raise TrainError(
                    f"--vae {name} does not have the weights that encoded the data, {source.identity['vae']}"
                )
            config = self._vae.config
            factor = vae_factor(self._vae)
            takes = config.latent_channels if latents else config.in_channels
            if self.shape[0] != takes:
                raise TrainError(f"--vae {name} needs {counted(takes, 'channel')}, but the data has {self.shape[0]}")
            if self.encodes:
                self.vae = _describe(self._vae)
                if any(side % factor for side in self.shape[1:]):
                    raise TrainError(
                        f"--image-size must be a multiple of {factor} for --vae {name}, got {self.shape[1]}"
                    )
                self.shape = (config.latent_channels, self.shape[1] // factor, self.shape[2] // factor)
        self._scaling = Scaling(self.vae["scale"], self.vae["shift"]) if self.vae else None

    @torch.no_grad()
    def encode(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """Model inputs (b, C, H, W) for this rank's samples; latents are drawn afresh from their posteriors."""
        if not self.encodes:
            return x
        assert self._scaling is not None
        posteriors = [self._vae.encode(each).latent_dist for each in x.split(ENCODED_AT_ONCE)]
        mean, std = (torch.cat([getattr(each, name) for each in posteriors]) for name in ("mean", "std"))
        ranks, share = self._ranks, len(x)
        generator = torch.Generator(x.device).manual_seed(derive_seed(self._seed, ENCODE, step))
        noise = torch.randn(self._batch, *self.shape, generator=generator, device=x.device)
        noise = noise[ranks.rank * share : (ranks.rank + 1) * share]
        return self._scaling.apply(mean + std * noise)

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images (n, 1 or 3, H, W) in [-1, 1] from model outputs; without a VAE, the first three latent channels."""
        if self._vae is not None:
            assert self._scaling is not None
            return torch.cat([self._vae.decode(self._scaling.undo(each)).sample for each in x.split(1)])
        return x if self.pixels else x[:, :3] / 2  # scaled latents have about unit variance


def _load(name, device):
    with by_option(SampleError, TrainError, "vae"):
        return load_vae(name, device)


def _describe(vae):
    with by_option(SampleError, TrainError):
        return describe_vae(vae)
