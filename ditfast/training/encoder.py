"""What the model sees of the data: samples as they are, or latents that are made of them in every step."""

import torch

from ditfast.fingerprint import fingerprint
from ditfast.ranks import Ranks
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import Scaling, describe_vae, load_vae, vae_factor
from ditfast.seeds import ENCODE, derive_seed
from ditfast.training import TrainError

ENCODED_AT_ONCE = 16  # an autoencoder's activations are large: 34 MB for each image and tensor at 256²


class Encoder:
    """From samples of the data to what the model sees, and from what it makes back to pictures.

    Args:
        name: of an AutoencoderKL: ema, mse, a folder; None if the model sees the samples as they are.
        source: the data. Latents are not encoded again: then the autoencoder only decodes.
        seed, batch: of the run.

    Attributes:
        shape: (C, H, W) of what the model sees.
        vae: what the latents are of, as `ditfast.checkpoints.sampling` describes it; None for pixels.

    Raises:
        TrainError: no such autoencoder, or one that does not fit the data.
    """

    def __init__(self, name: str | None, source, seed: int, batch: int, ranks: Ranks):
        self.shape, self._seed, self._batch, self._ranks = tuple(source.shape), seed, batch, ranks
        latents = source.identity["kind"] == "latents"
        self.encodes = name is not None and not latents
        self.pixels = name is None and not latents
        self.vae = source.vae if latents else None
        self._vae = None if name is None else _load(name, ranks.device)
        if self._vae is not None:
            if latents and fingerprint(self._vae) != source.identity["vae_checksum"]:
                raise TrainError(
                    f"--vae {name} has other weights than what the data was encoded with, {source.identity['vae']}"
                )
            config = self._vae.config
            factor = vae_factor(self._vae)
            takes = config.latent_channels if latents else config.in_channels
            if self.shape[0] != takes:
                raise TrainError(f"--vae {name} takes {takes} channels, the data has {self.shape[0]}")
            if self.encodes:
                self.vae = _describe(self._vae)
                if any(side % factor for side in self.shape[1:]):
                    raise TrainError(
                        f"--image-size must be a multiple of {factor} for --vae {name}, got {self.shape[1]}"
                    )
                self.shape = (config.latent_channels, *(side // factor for side in self.shape[1:]))
        self._scaling = self.vae and Scaling(self.vae["scale"], self.vae["shift"])

    @torch.no_grad()
    def encode(self, x, step: int):
        """(b, C, H, W) of this rank as the model sees it: latents are drawn from their posterior, anew each time."""
        if not self.encodes:
            return x
        posteriors = [self._vae.encode(each).latent_dist for each in x.split(ENCODED_AT_ONCE)]
        mean, std = (torch.cat([getattr(each, name) for each in posteriors]) for name in ("mean", "std"))
        ranks, share = self._ranks, len(x)
        generator = torch.Generator(x.device).manual_seed(derive_seed(self._seed, ENCODE, step))
        noise = torch.randn(self._batch, *self.shape, generator=generator, device=x.device)
        noise = noise[ranks.rank * share : (ranks.rank + 1) * share]
        return self._scaling.apply(mean + std * noise)

    @torch.no_grad()
    def decode(self, x):
        """Pictures (n, 1 or 3, H, W) in [-1, 1] of what the model made; of a latent without a VAE three channels."""
        if self._vae is not None:
            return torch.cat([self._vae.decode(self._scaling.undo(each)).sample for each in x.split(1)])
        return x if self.pixels else x[:, :3] / 2  # scaled latents have about unit variance


def _load(name, device):
    try:
        return load_vae(name, device)
    except (SampleError, ImportError) as error:
        raise TrainError(str(error)) from error


def _describe(vae):
    try:
        return describe_vae(vae)
    except SampleError as error:
        raise TrainError(str(error)) from error
