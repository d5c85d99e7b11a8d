"""The file format that `python -m ditfast.encode` writes and `ditfast.data.latents` reads.

    latents-00000.safetensors, …   shards, each with n consecutive images:
        mean, std                  (n, C, h, w) float32 or float16: posterior of an image, not scaled
        mean_flip, std_flip        posterior of its mirror image, which differs from the mirrored posterior
        labels                     (n,) int64
        checksums                  (n, 2) int64: CRC-32 of mean, std and label of an image, and of its mirror image
        the metadata's "unreadable" lists the names of unreadable images as JSON
    encode.json                    the settings that determine the shards, and the command; written first
    latents.json                   index: settings, scale, shift, and the number of images per shard; written last

An image of size S takes 4 * C * (S / 8)^2 numbers, with C = 4: 64 KiB in float32 for S = 256. float16 rounds the mean
with a relative error of up to 2^-11, which can exceed the posterior's std; use float32 unless disk space is short.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ditfast.data.errors import DataError
from ditfast.resumable import ResumableFolder, read_json, write_json

FORMAT = 1
TENSORS = ("mean", "std", "mean_flip", "std_flip")
CHECKSUMS = "checksums"
INDEX, STARTED = "latents.json", "encode.json"


def unfinished(folder: Path) -> str | None:
    """Message saying how to finish encoding into a folder; None if encoding has not started there."""
    command = (read_json(folder / STARTED) or {}).get("command")
    return command and f"{folder} is not finished: resume with {command}"


def checksum(mean: torch.Tensor, std: torch.Tensor, label: torch.Tensor) -> int:
    """CRC-32 of one image's mean (C, h, w), std (C, h, w) and label ()."""
    total = 0
    for each in (mean, std, label):
        total = zlib.crc32(each.contiguous().numpy().data, total)
    return total


def _checksums(tensors):
    """(n, 2)"""
    rows = zip(*(tensors[name] for name in (*TENSORS, "labels")), strict=True)
    found = [(checksum(mean, std, y), checksum(flipped, std_flip, y)) for mean, std, flipped, std_flip, y in rows]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


class Shards(ResumableFolder):
    """A folder of encoded images.

    Args:
        path: the folder.
        settings: everything that determines its contents, as JSON values.
        count: number of images, readable or not.
        size: images per shard.

    Attributes:
        ranges: range of image indices of each shard.
    """

    record, holds, pattern, error = STARTED, "shards", r"latents-\d{5,}\.safetensors", DataError

    def __init__(self, path: str | Path, settings: dict[str, Any], count: int, size: int):
        super().__init__(path, {"format": FORMAT, **settings, "shard_size": size})
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def file(self, shard: int) -> Path:
        return self.path / f"latents-{shard:05d}.safetensors"

    def clear(self) -> None:
        (self.path / INDEX).unlink(missing_ok=True)  # first: nothing is read without it
        super().clear()

    def comparable(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings without the command, with those of the data flattened in."""
        flat = {**settings, **settings.get("data", {})}
        return {name: value for name, value in flat.items() if name not in ("command", "data")}

    def missing(self) -> list[int]:
        """Shards that have not been written."""
        return [shard for shard in range(len(self.ranges)) if not self.file(shard).exists()]

    def write(self, shard: int, tensors: dict[str, torch.Tensor], unreadable: list[str]) -> None:
        """Write a shard with the tensors of the format above, except checksums, which are added."""
        tensors = {**tensors, CHECKSUMS: _checksums(tensors)}
        content = save(tensors, {"unreadable": json.dumps(unreadable)})
        with self.writing(self.file(shard)) as part:
            part.write_bytes(content)

    def finish(self, classes: list[str]) -> dict[str, Any]:
        """Write the index once all shards are there, and return it.

        Raises:
            DataError: a shard is damaged, or no image was readable.
        """
        files = [self.file(shard) for shard in range(len(self.ranges))]
        found = [self._contents(file) for file in files]
        index = {
            **self.settings,
            "classes": classes,
            "count": sum(count for count, _ in found),
            "unreadable": [name for _, names in found for name in names],
            "shards": [{"file": file.name, "count": count} for file, (count, _) in zip(files, found, strict=True)],
        }
        if not index["count"]:
            raise DataError("no image is readable")
        with self.writing(self.path / INDEX) as part:
            write_json(part, index)
        return index

    def _contents(self, path):
        """Returns (number of images in a shard, names of those skipped)."""
        try:
            file = safe_open(path, "pt")
            return file.get_slice("labels").get_shape()[0], json.loads(file.metadata()["unreadable"])
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: delete it and encode again ({error})") from error
