"""Images in a folder for each class, as ImageNet comes."""

import os
import zlib
from pathlib import Path

import numpy as np
import torch

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.image_files import MODES, decode_image, image_names, is_image, visible_entries
from ditfast.data.preprocess import center_crop, to_tensor

MOST = 8192  # pixels of a side: such an image of float32 takes 768 MiB
LONGEST = 1000  # times the shorter side: fitting the shorter side of a line to the sample would take all memory


class Images:
    """The images below folder/<class>/, in the order of their paths; class k is the k-th folder by name.

    Names are sorted by their characters, as torchvision's ImageFolder does: 1, 10, 2. `image_files` tells what an
    image is and how it is read.

    Args:
        folder: of the class folders.
        image_size: S; each image is scaled and cropped to the middle, see `preprocess.center_crop`.
        channels: 3, or 1 for grey.
        flip: mirror every second image, by chance.

    Attributes:
        shape: (channels, S, S), pixels in [-1, 1].
        classes: the names of the class folders.
        num_classes, count, identity: see `ditfast.data`. The identity has checksums of the names of all classes and
            files, and none of what is in the files.

    Raises:
        DataError: a folder is missing, empty or cannot be read, images are beside the class folders, or a size or
            number of channels that cannot be.
    """

    def __init__(self, folder, image_size: int | None = None, channels: int = 3, flip: bool = True):
        if type(image_size) is not int or image_size < 1:
            raise DataError(f"image_size of a folder of images must be at least 1, got {image_size}")
        if image_size > MOST:
            raise DataError(f"image_size of a folder of images must be at most {MOST}, got {image_size}")
        if type(channels) is not int or channels not in MODES:
            raise DataError(f"channels must be 1 or 3, got {channels}")
        self.folder, self.flip, self.shape = Path(folder), flip, (channels, image_size, image_size)
        self.classes = _classes(self.folder)
        self.num_classes = len(self.classes)
        self._list()
        self.identity = {
            "kind": "images",
            "count": self.count,
            "classes": self.num_classes,
            "class_names": f"{zlib.crc32(os.fsencode('/'.join(self.classes))):08x}",
            "file_names": f"{zlib.crc32(self._last, zlib.crc32(self._ends, zlib.crc32(self._names))):08x}",
            "image_size": image_size,
            "channels": channels,
            "flip": flip,
        }

    def path(self, index: int) -> Path:
        """The file of image ``index``."""
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        return self.folder / self.classes[self._label(index)] / os.fsdecode(self._names[start:end])

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Image ``index``, float32 (C, S, S), and its class. The generator decides the flip.

        Raises:
            Unreadable: the file is broken, or its longer side more than `LONGEST` times the shorter.
        """
        path = self.path(index)
        image = decode_image(path, self.shape[0])
        if max(image.size) > LONGEST * min(image.size):
            raise Unreadable(f"{path} is too long for a square, its size is {image.width} x {image.height}")
        x = to_tensor(center_crop(image, self.shape[1]))
        if self.flip and torch.rand((), generator=generator, device="cpu") < 0.5:
            x = x.flip(-1)
        return x, self._label(index)

    def _list(self):
        """All names end to end, and where each ends: a list would take ten times the memory in every worker."""
        names, lengths, counts = [], [], []
        for each in self.classes:
            found = sorted(image_names(os.fsencode(self.folder / each)))
            if not found:
                raise DataError(f"{self.folder / each} holds no images")
            names.append(b"".join(found))
            lengths += map(len, found)
            counts.append(len(found))
        self._names, self._ends = b"".join(names), np.cumsum(lengths)  # bytes; int64 (count,)
        self._last = np.cumsum(counts)  # int64 (num_classes,): the number of images up to and with each class
        self.count = int(self._last[-1])

    def _label(self, index):
        return int(np.searchsorted(self._last, index, side="right"))


def _classes(folder):
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    names, beside = [], None
    for name, is_folder in visible_entries(folder):
        if is_folder:
            names.append(name)
        elif is_image(name):
            beside = name
    if not names:
        raise DataError(f"{folder} holds no class folders: images must be in {folder / '<class>'}")
    if beside:
        raise DataError(f"{folder} holds an image beside the class folders: {beside}")
    return sorted(names)
