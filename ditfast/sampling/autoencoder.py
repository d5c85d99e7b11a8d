"""Autoencoders from diffusers (the ``vae`` here is an AutoencoderKL), and how models see their latents."""

import inspect
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ditfast.checkpoints.folders import download, download_config, is_hub_name, list_weights
from ditfast.checkpoints.pipelines import VAE
from ditfast.counted import counted
from ditfast.fingerprint import sha256
from ditfast.optional import import_optional
from ditfast.sampling import SampleError

PUBLISHED_VAES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}


class Scaling(NamedTuple):
    """The map from an autoencoder's latents z, (B, C, h, w), to what models see: (z - shift) * scale.

    Scale and shift are one number each, or one per channel.
    """

    scale: float | list[float]
    shift: float | list[float] = 0.0

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale, z)

    def undo(self, x: torch.Tensor) -> torch.Tensor:
        return x / _per_channel(self.scale, x) + _per_channel(self.shift, x)


def latents_of(name: str) -> tuple[int, int]:
    """The channels and the `vae_factor` of `load_vae`'s autoencoder, from its config alone; raises as that does."""
    config = _read_config(name)
    kind = import_optional("diffusers").AutoencoderKL
    config = {key: each.default for key, each in inspect.signature(kind).parameters.items()} | config
    return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)


def load_vae(name: str, device: str | torch.device) -> Any:
    """Load a frozen AutoencoderKL in float32.

    Args:
        name: "ema", "mse", a folder, or "owner/name/vae" in a pipeline on the Hugging Face Hub.

    Raises:
        SampleError: it cannot be found, lacks weights, or is another kind of autoencoder.
        ImportError: diffusers is missing.
    """
    _read_config(name)
    kind = import_optional("diffusers").AutoencoderKL
    with _loading(name):
        folder = _folder(name, download)
        variants = sorted(list_weights(folder))
        variant = variants[0] or None if variants else None  # "" comes first
        vae, found = kind.from_pretrained(folder, variant=variant, output_loading_info=True, low_cpu_mem_usage=False)
    if missing := found["missing_keys"]:
        raise SampleError(f"vae {name} lacks {counted(len(missing), 'weight')}, {min(missing)} first")
    return vae.to(device).float().eval().requires_grad_(False)


def _read_config(name):
    """The autoencoder's config as stored."""
    if not _on_hub(name) and not Path(name).is_dir():
        raise SampleError(f"vae must be ema, mse or a folder, got {name!r}")
    kind = import_optional("diffusers").AutoencoderKL
    with _loading(name):
        config = kind.load_config(_folder(name, download_config))
    if (stored := config.get("_class_name", kind.__name__)) != kind.__name__:
        raise SampleError(f"vae {name} must be an {kind.__name__}, got an {stored}")
    return config


def _folder(name, fetch):
    """The autoencoder's folder; ``fetch`` downloads a repository's subfolder."""
    place = _on_hub(name)
    return fetch(*place) / place[1] if place else Path(name)


def _on_hub(name):
    """The repository and subfolder of an autoencoder on the Hub; None for a folder."""
    if name in PUBLISHED_VAES:
        return PUBLISHED_VAES[name], ""
    repo, _, part = name.rpartition("/")
    return (repo, VAE) if part == VAE and not Path(name).is_dir() and is_hub_name(repo) else None


@contextmanager
def _loading(name):
    try:
        yield
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise SampleError(f"vae {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def vae_factor(vae: Any) -> int:
    """The downsampling factor from an image to its latent, per side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def scaling_of(vae: Any) -> Scaling:
    """The scaling in the autoencoder's config: a scale and a shift, or a mean and a standard deviation per channel.

    Raises:
        SampleError: the config has both.
    """
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    mean, std = vae.config.latents_mean, vae.config.latents_std
    if mean is None and std is None:
        return Scaling(scale, shift or 0.0)
    if mean is None or std is None or shift or not len(mean) == len(std) == vae.config.latent_channels:
        raise SampleError(
            "the autoencoder's latents_mean and latents_std must be one number per latent channel, "
            f"{vae.config.latent_channels} here, without a shift_factor, got {mean}, {std} and {shift}"
        )
    return Scaling([scale / each for each in std], list(mean))


def describe_vae(vae: Any) -> dict[str, Any]:
    """The autoencoder as recorded in a model's ``sampling``: sha256, scale, shift."""
    return {"sha256": sha256(vae), **scaling_of(vae)._asdict()}


def _per_channel(value: float | list[float], like: torch.Tensor) -> float | torch.Tensor:
    """A number as it is; a list as a tensor (C, 1, 1) on the device of ``like``."""
    if isinstance(value, float | int):
        return value
    return torch.tensor(value, dtype=like.dtype, device=like.device)[:, None, None]
