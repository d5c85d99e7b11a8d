"""The files that `python -m ditfast.encode` writes, and `ditfast.data.latents` reads.

    latents-00000.safetensors, …   of a range of the images each, in their order, n of them:
        mean, std                  (n, C, h, w) float32 or float16: the posterior of an image, not scaled
        mean_flip, std_flip        the same of its mirror image, which is not the mirror image of the same
        labels                     (n,) int64
        checksums                  (n, 2) int64: CRC-32 of an image's mean, std and label, and of the mirror image's
        with the names of the images that could not be read, as JSON under the metadata's "unreadable"
    encode.json                    what the shards follow from, and the command; written first
    latents.json                   all about them, scale and shift too, and how many are in each file; written last

One image of size S takes 4 * C * (S / 8)^2 numbers, with C = 4: 64 KiB in float32 for S = 256. Half-precision rounds
the mean by up to 2^-11 of itself, which can be more than a posterior's std; so float32 unless the disk is too small.
"""

import json
import zlib
from pathlib import Path

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
    """What to do about a folder in which encode has not finished; None if it has not begun."""
    command = (read_json(folder / STARTED) or {}).get("command")
    return command and f"{folder} is not finished: go on with {command}"


def checksum(mean, std, label) -> int:
    """CRC-32 of what a sample is drawn from: (C, h, w), (C, h, w), ()."""
    total = 0
    for each in (mean, std, label):
        total = zlib.crc32(each.contiguous().numpy(), total)
    return total


def _checksums(tensors):
    """(n, 2)"""
    rows = zip(*(tensors[name] for name in (*TENSORS, "labels")), strict=True)
    found = [(checksum(mean, std, y), checksum(flipped, std_flip, y)) for mean, std, flipped, std_flip, y in rows]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


class Shards(ResumableFolder):
    """The folder of an encoding.

    Args:
        path: of the folder.
        settings: all that its content follows from, as JSON values.
        count: images, readable or not.
        size: of a shard's range of images.
    """

    record, holds, pattern, error = STARTED, "shards", r"latents-\d{5,}\.safetensors", DataError

    def __init__(self, path, settings: dict, count: int, size: int):
        super().__init__(path, {"format": FORMAT, **settings, "shard_size": size})
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def file(self, shard: int) -> Path:
        return self.path / f"latents-{shard:05d}.safetensors"

    def clear(self) -> None:
        (self.path / INDEX).unlink(missing_ok=True)  # first: without it nothing else is trusted
        super().clear()

    def comparable(self, settings: dict) -> dict:
        """The settings without the command, and with those of the data among them."""
        flat = {**settings, **settings.get("data", {})}
        return {name: value for name, value in flat.items() if name not in ("command", "data")}

    def missing(self) -> list[int]:
        return [shard for shard in range(len(self.ranges)) if not self.file(shard).exists()]

    def write(self, shard: int, tensors: dict, unreadable: list[str]) -> None:
        tensors = {**tensors, CHECKSUMS: _checksums(tensors)}
        content = save(tensors, {"unreadable": json.dumps(unreadable)})
        with self.writing(self.file(shard)) as part:
            part.write_bytes(content)

    def finish(self, classes: list[str]) -> dict:
        """Write the index of the shards, when they are all there. Returns it."""
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
        """How many images are in a shard, and the names of those left out."""
        try:
            file = safe_open(path, "pt")
            return file.get_slice("labels").get_shape()[0], json.loads(file.metadata()["unreadable"])
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged: delete it, and encode again ({error})") from error
