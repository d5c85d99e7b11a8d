"""A folder of images with one subfolder per class, as in ImageNet."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.image_files import MODES, decode_image, image_names, is_image, visible_entries
from ditfast.data.preprocess import center_crop, to_tensor

MOST = 8192  # pixels per side: a float32 image of this size takes 768 MiB
LONGEST = 1000  # times the shorter side: scaling the shorter side of a line up to the sample would exhaust memory


class Images:
    """The images in folder/<class>/, ordered by path; class k is the k-th folder by name.

    Names are sorted as strings, as in torchvision's ImageFolder: 1, 10, 2. `image_files` defines which files are
    images and how they are decoded.

    Args:
        folder: contains the class folders.
        image_size: S; images are scaled and center-cropped, see `preprocess.center_crop`.
        channels: 3 for RGB, or 1 for gray.
        flip: mirror images with probability 1/2.

    Attributes:
        shape: (channels, S, S), pixels in [-1, 1].
        classes: the names of the class folders.
        num_classes, count, identity: see `ditfast.data.Source`. The identity has checksums of all class and file
            names, but not of file contents.

    Raises:
        DataError: a folder is missing, empty or unreadable, there are images next to the class folders, or an
            invalid size or number of channels.
    """

    def __init__(self, folder: str | Path, image_size: int | None = None, channels: int = 3, flip: bool = True):
        if type(image_size) is not int or image_size < 1:
            raise DataError(f"image_size of a folder of images must be at least 1, got {image_size}")
        if image_size > MOST:
            raise DataError(f"image_size of a folder of images must be at most {MOST}, got {image_size}")
        if type(channels) is not int or channels not in MODES:
            raise DataError(f"channels must be 1 or 3, got {channels}")
        self.folder, self.flip = Path(folder), flip
        self.shape: tuple[int, int, int] = (channels, image_size, image_size)
        self.classes = _classes(self.folder)
        self.num_classes = len(self.classes)
        self.count = self._list()
        self.identity: dict[str, Any] = {
            "kind": "images",
            "count": self.count,
            "classes": self.num_classes,
            "class_names": f"{zlib.crc32(os.fsencode('/'.join(self.classes))):08x}",
            "file_names": f"{zlib.crc32(self._last.data, zlib.crc32(self._ends.data, zlib.crc32(self._names))):08x}",
            "image_size": image_size,
            "channels": channels,
            "flip": flip,
        }

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        return self.folder / self.classes[self._label(index)] / os.fsdecode(self._names[start:end])

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Image ``index``, float32 (C, S, S), and its class; ``generator`` decides whether it is flipped.

        Raises:
            Unreadable: the file is broken, or its longer side is more than `LONGEST` times the shorter.
        """
        path = self.path(index)
        image = decode_image(path, self.shape[0])
        if max(image.size) > LONGEST * min(image.size):
            raise Unreadable(f"{path} is too elongated to crop to a square: {image.width} x {image.height}")
        x = to_tensor(center_crop(image, self.shape[1]))
        if self.flip and torch.rand((), generator=generator, device="cpu") < 0.5:
            x = x.flip(-1)
        return x, self._label(index)

    def _list(self) -> int:
        """Store all names as one byte string with offsets (a tenth of a list's memory per worker); count them."""
        names: list[bytes] = []
        lengths: list[int] = []
        counts: list[int] = []
        for each in self.classes:
            found = sorted(image_names(os.fsencode(self.folder / each)))
            if not found:
                raise DataError(f"{self.folder / each} contains no images")
            names.append(b"".join(found))
            lengths += map(len, found)
            counts.append(len(found))
        self._names, self._ends = b"".join(names), np.cumsum(lengths)  # bytes; int64 (count,)
        self._last = np.cumsum(counts)  # int64 (num_classes,): number of images up to and including each class
        return int(self._last[-1])

    def _label(self, index):
        return int(np.searchsorted(self._last, index, side="right"))


def _classes(folder):
    if not folder.is_dir():
        raise DataError(f"folder must be a folder of images, got {str(folder)!r}")
    names, beside = [], None
    for name, is_folder in visible_entries(folder):
        if is_folder:
            names.append(name)
        elif is_image(name):
            beside = name
    if not names:
        raise DataError(f"{folder} contains no class folders: images must be in {folder / '<class>'}")
    if beside:
        raise DataError(f"{folder} contains an image outside the class folders: {beside}")
    return sorted(names)
