"""Sample grids during training."""

import warnings
from pathlib import Path

import torch

from ditfast.atomic import atomic_write
from ditfast.command import by_option
from ditfast.models import DiT
from ditfast.models.guidance import default_cfg_channels
from ditfast.optional import import_optional
from ditfast.ranks import Ranks
from ditfast.sampling import SampleError
from ditfast.sampling.decode import to_uint8
from ditfast.sampling.files import tile_images
from ditfast.sampling.flow import FlowSampler
from ditfast.sampling.sampler import Guidance, Sampler, sample
from ditfast.sampling.start import draw_start
from ditfast.training import TrainError
from ditfast.training.config import Config
from ditfast.training.encoder import Encoder
from ditfast.training.objective import describe_objective

COUNT = 16


def _make_sampler(config, encoder):
    if config.objective == "diffusion":
        settings = {"clip": encoder.pixels, "noise_schedule": config.noise_schedule}
        return Sampler("ddim", config.sample_steps, config.learn_sigma, **settings)
    name = "average" if config.objective == "meanflow" else "euler"
    return FlowSampler(name, config.sample_steps, describe_objective(config))


class Preview:
    """Samples from fixed noise and labels: sample i has seed i and label i modulo the number of classes.

    Raises:
        TrainError: the sampler cannot take ``config.sample_steps`` steps.
    """

    def __init__(self, config: Config, encoder: Encoder, num_classes: int, ranks: Ranks):
        self._encoder, self._ranks = encoder, ranks
        with by_option(SampleError, TrainError, steps="sample_steps"):
            self._sampler = _make_sampler(config, encoder)
        assert config.cfg is not None  # filled in
        self._guidance = Guidance(config.cfg, 0.0, 1.0, default_cfg_channels(encoder.shape[0]))
        self._labels = [i % num_classes for i in range(COUNT)]
        self._classes = num_classes
        self._dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16

    def write(self, model: DiT, path: Path) -> None:
        """Write a grid of samples as PNG on rank 0. All ranks sample, because FSDP2 shards the weights over them."""
        device = self._ranks.device
        starts = [
            draw_start(i, self._encoder.shape, self._classes, device, label) for i, label in enumerate(self._labels)
        ]
        # the sampler is the config's, which the model records when it is exported
        x = sample(model, self._sampler, self._guidance, starts, device, self._dtype, allow_mismatch=True)
        if self._ranks.is_first:
            images = to_uint8(self._encoder.decode(x))
            picture = import_optional("PIL.Image").fromarray(tile_images(images, scale=max(1, 64 // images.shape[1])))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with atomic_write(path) as part:
                    picture.save(part, format="PNG")
            except OSError as error:  # a missing grid should not end the run
                warnings.warn(f"cannot write {path}: {error.strerror or error}", stacklevel=2)
