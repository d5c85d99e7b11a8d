"""Images to evaluate: a folder or an npz, read a few at a time. Nothing is resized, cropped or scaled.

Both kinds have

    count: int, size: (H, W)
    read(numbers) -> iterator of uint8 (H, W, 3), for ascending numbers in [0, count)

`ditfast.data.image_files` tells which files are images, and how they become RGB, here as in training. An npz holds
arr_0, uint8 (N, H, W, 3), as ADM's evaluator reads it and ditfast.sample writes it.
"""

import math
import os
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ditfast.data import DataError, Unreadable
from ditfast.data.image_files import ENDINGS, decode_image, image_names, open_image
from ditfast.evaluation import EvaluationError

MOST_PIXELS = 1 << 28  # of a picture, whatever an npz claims


class ImageFolder:
    """Pictures, all of one size, which their headers are read for at once."""

    def __init__(self, option: str, paths: list[Path]):
        self._option, self._paths, self.count = option, paths, len(paths)
        self.size = self._header(paths[0])
        for path in paths[1:]:
            if (size := self._header(path)) != self.size:
                differing = f"{_by(self.size)} in {paths[0]} and {_by(size)} in {path}"
                raise EvaluationError(f"{option}: images must have one size, got {differing}")

    def read(self, numbers):
        for number in numbers:
            with _file_errors(self._option):
                array = np.array(decode_image(self._paths[number], 3))
            yield array

    def _header(self, path):
        with _file_errors(self._option), open_image(path) as image:
            return image.height, image.width


class ImageNpz:
    """The member arr_0 of an npz, of which a picture is in memory at a time."""

    def __init__(self, option: str, path: Path):
        self._path, self._where = path, f"{option} {path}"
        with npz_errors(self._where), zipfile.ZipFile(path) as archive:
            (shape, columns_first, dtype), self._start = read_header(archive, "arr_0")
            held = archive.getinfo("arr_0.npy").file_size - self._start
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or columns_first or min(shape) < 1:
            raise EvaluationError(f"{self._where}: arr_0 must be uint8 (N, H, W, 3), got {dtype} {shape}")
        if math.prod(shape[1:3]) > MOST_PIXELS:
            raise EvaluationError(f"{self._where}: images must have at most {MOST_PIXELS} pixels, got {shape}")
        if held != math.prod(shape):
            raise EvaluationError(f"{self._where} is truncated: arr_0 {shape} has {held} bytes")
        self.count, *self.size = shape[:3]
        self.size = tuple(self.size)

    def read(self, numbers):
        length, following = self.size[0] * self.size[1] * 3, 0
        with npz_errors(self._where), zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as member:
            member.read(self._start)
            for number in numbers:
                for _ in range(number - following):
                    member.read(length)  # seeking would give up the check of the archive's checksum
                following = number + 1
                yield np.frombuffer(member.read(length), np.uint8).reshape(*self.size, 3)


def read_header(archive, name: str):
    """((shape, columns first, dtype), bytes before the numbers) of an array in an open npz."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return header[version](member), member.tell()


@contextmanager
def _file_errors(option):
    """Tells which option's files or folders cannot be read."""
    try:
        yield
    except (DataError, Unreadable) as error:
        raise EvaluationError(f"{option}: {error}") from error


@contextmanager
def npz_errors(where: str):
    """Turns what a damaged npz raises into one line."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:  # a broken archive can raise anything: BadZipFile, zlib.error, NotImplementedError, …
        raise EvaluationError(f"{where} is truncated or no npz: {error}") from error


def array_names(option: str, path) -> list[str]:
    """The arrays in an npz; none in a folder, or where there is nothing."""
    if not Path(path).is_file():
        return []
    with npz_errors(f"{option} {path}"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_images(option: str, path):
    """The images of a folder, with those in its folders, ordered by path; or of an npz.

    Raises:
        EvaluationError: there is none, or they are not all readable and of one size.
    """
    path = Path(path)
    if path.is_dir():
        with _file_errors(option):
            names = sorted(image_names(os.fsencode(path)))
        if not names:
            raise EvaluationError(f"{option} {path} holds no image ({b', '.join(ENDINGS).decode()})")
        return ImageFolder(option, [path / os.fsdecode(name) for name in names])
    if not path.is_file():
        wrong = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise EvaluationError(f"{option} {path} {wrong}")
    names = array_names(option, path)
    if "arr_0" not in names:
        raise EvaluationError(f"{option} {path} holds no arr_0, the images, only {', '.join(names) or 'nothing'}")
    return ImageNpz(option, path)


def read_batches(images, numbers, size: int):
    """uint8 tensors (b, 3, H, W), b <= size, of the images with these numbers."""
    batch = []
    for array in images.read(numbers):
        batch.append(torch.tensor(array, device="cpu").permute(2, 0, 1))
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most ``most`` numbers in [0, count), evenly spaced: folders are often sorted by class."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


def _by(size):
    return f"{size[1]} x {size[0]}"
