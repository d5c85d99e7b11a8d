"""Latents sampled from an autoencoder's posteriors, as written by `python -m ditfast.encode`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.index import check_index
from ditfast.data.shards import CHECKSUMS, FORMAT, INDEX, TENSORS, checksum, unfinished
from ditfast.sampling.autoencoder import Scaling
from ditfast.small_files import read_object

LATER = ("vae_sha256", "shift")  # fields missing in older folders
IDENTIFYING = ("vae", "vae_checksum", "scale", "image_size", "dtype", "data")  # index fields in the identity


class Latents:
    """Latents drawn afresh from the posterior of an image or its mirror image: (mean + std * eps - shift) * scale.

    Equivalent to encoding the images in every step with random flips, without the cost. Samples are read directly
    from their place in the shards; no file is loaded as a whole.

    Args:
        folder: written by encode; see `ditfast.data.shards` for the format.
        image_size: in pixels; only checked.
        flip: use the mirror image's posterior with probability 1/2.

    Attributes:
        shape: (4, S / 8, S / 8) for the published autoencoders and images of size S.
        classes: the names of the classes.
        vae: the latents' autoencoder, as described by `ditfast.checkpoints.sampling`.
        num_classes, count, identity: see `ditfast.data.Source`.

    Raises:
        DataError: encode has not finished, a shard is missing or damaged, the format is of another version, or the
            images had another size.
    """

    def __init__(self, folder: str | Path, image_size: int | None = None, flip: bool = True):
        self.folder, self.flip = Path(folder), flip
        about = _read_index(self.folder)
        check_index(self.folder / INDEX, about)
        if image_size not in (None, about["image_size"]):
            raise DataError(f"image_size of {folder} must be {about['image_size']}, got {image_size}")
        self.shape: tuple[int, int, int] = tuple(about["shape"])
        self.classes: list[str] = about["classes"]
        self.num_classes = len(self.classes)
        self.count: int = about["count"]
        scaling = {"scale": about["scale"], "shift": about.get("shift", 0.0)}
        self.vae: dict[str, Any] = {"sha256": about.get("vae_sha256"), **scaling}
        self._scaling = Scaling(**scaling)
        self._files = [each["file"] for each in about["shards"]]
        self._ends = np.cumsum([each["count"] for each in about["shards"]])  # (shards,)
        self._opened: dict[int, Any] = {}  # open files by shard
        self._summed: set[int] = set()  # shards with checksums, which older versions did not write
        for shard, each in enumerate(about["shards"]):
            self._check(shard, each["count"])
        self.identity: dict[str, Any] = {
            "kind": "latents",
            "count": self.count,
            "classes": self.num_classes,
            "flip": flip,
            **{name: about[name] for name in (*IDENTIFYING, *LATER) if name in about},
            "unreadable": len(about["unreadable"]),
        }

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """A latent of image ``index``, float32 (C, H, W), and its class; ``generator`` decides the flip and eps.

        Raises:
            Unreadable: the file has disappeared, or the latent is damaged.
            DataError: the class is out of range.
        """
        shard = int(np.searchsorted(self._ends, index, side="right"))
        place = index - int(self._ends[shard - 1]) if shard else index
        flipped = "_flip" if self.flip and torch.rand((), generator=generator, device="cpu") < 0.5 else ""
        mean, std, label = self._posterior(shard, place, flipped)
        if not 0 <= label < self.num_classes:
            path, last = self.folder / self._files[shard], self.num_classes - 1
            raise DataError(f"the label of image {place} in {path} must be in [0, {last}], got {int(label)}")
        eps = torch.randn(self.shape, generator=generator, device="cpu")
        return self._scaling.apply(mean.float() + std.float() * eps), int(label)

    def _posterior(self, shard, place, flipped):
        """mean and std (C, h, w) and label () of an image in a shard, or of its mirror image."""
        path = self.folder / self._files[shard]
        try:
            with torch.device("cpu"):  # safetensors would use the default device
                found = [self._slice(shard, name)[place] for name in ("mean" + flipped, "std" + flipped, "labels")]
                known = self._slice(shard, CHECKSUMS)[place] if shard in self._summed else None
        except (OSError, SafetensorError) as error:
            raise Unreadable(f"{path} cannot be read: {error}") from error
        if known is not None and known[int(flipped != "")] != checksum(*found):
            raise Unreadable(f"image {place} in {path} is damaged: delete the file and encode again")
        return found

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}  # open files cannot be sent to workers

    def _open(self, shard):
        if shard not in self._opened:
            self._opened[shard] = safe_open(self.folder / self._files[shard], "pt")
        return self._opened[shard]

    def _slice(self, shard, name):
        return self._open(shard).get_slice(name)

    def _check(self, shard, count):
        """Raise if a shard is missing or damaged; opening it compares its header with its length."""
        path = self.folder / self._files[shard]
        expected = {**dict.fromkeys(TENSORS, [count, *self.shape]), "labels": [count]}
        try:
            names = self._open(shard).keys()
            if CHECKSUMS in names:
                self._summed.add(shard)
                expected[CHECKSUMS] = [count, 2]
            found = {name: self._slice(shard, name).get_shape() for name in names}
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: encode again, which redoes only missing shards") from error
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: delete it and encode again ({error})") from error
        if found != expected:
            raise DataError(f"{path} is damaged: delete it and encode again (it holds {found})")


def _read_index(folder):
    path = folder / INDEX
    if not path.is_file():
        raise DataError(unfinished(folder) or f"{folder} contains no {INDEX}: it was not written by encode")
    try:
        about = read_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if about.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {about.get('format')}, but this version of ditfast reads {FORMAT}: encode again"
        )
    if missing := [
        name for name in (*IDENTIFYING, "shape", "classes", "count", "unreadable", "shards") if name not in about
    ]:
        raise DataError(f"{path} lacks {', '.join(missing)}: encode again")
    return about
