"""Images as an autoencoder's posteriors, which `python -m ditfast.encode` wrote."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.index import check_index
from ditfast.data.shards import CHECKSUMS, FORMAT, INDEX, TENSORS, checksum, unfinished
from ditfast.sampling.autoencoder import Scaling
from ditfast.small_files import read_object

LATER = ("vae_sha256", "shift")  # which folders from before do not have
IDENTIFYING = ("vae", "vae_checksum", "scale", "image_size", "dtype", "data")  # of the index, in the identity


class Latents:
    """Latents, drawn anew from the posterior of an image or its mirror image: (mean + std * eps - shift) * scale.

    This is what a training run sees that encodes its images in every step, with random flips, without its cost. A
    sample is read where it lies in its file; nothing is loaded whole.

    Args:
        folder: that encode wrote; `ditfast.data.shards` has the format.
        image_size: in pixels; only checked.
        flip: take the mirror image's posterior for every second sample, by chance.

    Attributes:
        shape: (4, S / 8, S / 8) for the published autoencoders and images of size S.
        classes: the names of the classes.
        vae: of the latents, as `ditfast.checkpoints.sampling` describes it.
        num_classes, count, identity: see `ditfast.data`.

    Raises:
        DataError: encode is not finished, a shard is missing or damaged, the format is another version's, or the
            images had another size.
        ImportError: safetensors is not installed.
    """

    def __init__(self, folder, image_size: int | None = None, flip: bool = True):
        self.folder, self.flip = Path(folder), flip
        about = _read_index(self.folder)
        check_index(self.folder / INDEX, about)
        if image_size not in (None, about["image_size"]):
            raise DataError(f"image_size of {folder} must be {about['image_size']}, got {image_size}")
        self.shape, self.classes = tuple(about["shape"]), about["classes"]
        self.num_classes, self.count = len(self.classes), about["count"]
        self.vae = {"sha256": about.get("vae_sha256"), "scale": about["scale"], "shift": about.get("shift", 0.0)}
        self._scaling = Scaling(self.vae["scale"], self.vae["shift"])
        self._files = [each["file"] for each in about["shards"]]
        self._ends = np.cumsum([each["count"] for each in about["shards"]])  # (shards,)
        self._opened, self._summed = {}, set()  # files; shards with checksums, which older versions did not write
        for shard, each in enumerate(about["shards"]):
            self._check(shard, each["count"])
        self.identity = {
            "kind": "latents",
            "count": self.count,
            "classes": self.num_classes,
            "flip": flip,
            **{name: about[name] for name in (*IDENTIFYING, *LATER) if name in about},
            "unreadable": len(about["unreadable"]),
        }

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """A latent of image ``index``, float32 (C, H, W), and its class. The generator decides the flip and eps.

        Raises:
            Unreadable: the file is gone since this was made, or the latent is not what was written.
            DataError: a class that there is not.
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
        """mean and std (C, h, w), label (): of an image of a shard, or of its mirror image."""
        path = self.folder / self._files[shard]
        try:
            with torch.device("cpu"):  # safetensors would take the default device
                found = [self._slice(shard, name)[place] for name in ("mean" + flipped, "std" + flipped, "labels")]
                known = self._slice(shard, CHECKSUMS)[place] if shard in self._summed else None
        except (OSError, SafetensorError) as error:
            raise Unreadable(f"{path} cannot be read: {error}") from error
        if known is not None and known[int(flipped != "")] != checksum(*found):
            raise Unreadable(f"image {place} in {path} is not what encode wrote: delete the file, and encode again")
        return found

    def __getstate__(self):
        return {**self.__dict__, "_opened": {}}  # an open file cannot be sent to a worker

    def _open(self, shard):
        if shard not in self._opened:
            self._opened[shard] = safe_open(self.folder / self._files[shard], "pt")
        return self._opened[shard]

    def _slice(self, shard, name):
        return self._open(shard).get_slice(name)

    def _check(self, shard, count):
        """Whether a shard is whole: opening compares its header with its length."""
        path = self.folder / self._files[shard]
        expected = {**dict.fromkeys(TENSORS, [count, *self.shape]), "labels": [count]}
        try:
            names = self._open(shard).keys()
            if CHECKSUMS in names:
                self._summed.add(shard)
                expected[CHECKSUMS] = [count, 2]
            found = {name: self._slice(shard, name).get_shape() for name in names}
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: encode again, which redoes what is missing") from error
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: delete it, and encode again ({error})") from error
        if found != expected:
            raise DataError(f"{path} is damaged: delete it, and encode again (it holds {found})")


def _read_index(folder):
    path = folder / INDEX
    if not path.is_file():
        raise DataError(unfinished(folder) or f"{folder} holds no {INDEX}: it is not what encode wrote")
    try:
        about = read_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if about.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {about.get('format')}, this version of ditfast reads {FORMAT}: encode again"
        )
    if missing := [
        name for name in (*IDENTIFYING, "shape", "classes", "count", "unreadable", "shards") if name not in about
    ]:
        raise DataError(f"{path} lacks {', '.join(missing)}: encode again")
    return about
