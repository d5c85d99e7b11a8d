"""Images to evaluate, from a folder or an npz, read a few at a time. Nothing is resized, cropped or scaled.

`ditfast.data.image_files` defines which files are images and how they become RGB, as in training. An npz has arr_0,
uint8 (N, H, W, 3), as read by ADM's evaluator and written by ditfast.sample.
"""

import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditfast.data import DataError, Unreadable
from ditfast.data.image_files import ENDINGS, decode_image, image_names, open_image
from ditfast.evaluation import EvaluationError

MOST_PIXELS = 1 << 28  # per image, whatever an npz claims


class ImageFolder:
    """Image files of one size; the constructor reads all headers.

    Attributes:
        count: number of images.
        size: (H, W).

    Raises:
        EvaluationError: a file is not a readable image, or sizes differ.
    """

    def __init__(self, option: str, paths: list[Path]):
        self._option, self._paths, self.count = option, paths, len(paths)
        self.size = self._header(paths[0])
        for path in paths[1:]:
            if (size := self._header(path)) != self.size:
                differing = f"{_by(self.size)} in {paths[0]} and {_by(size)} in {path}"
                raise EvaluationError(f"{option}: images must all have the same size, got {differing}")

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Images uint8 (H, W, 3), for ascending numbers in [0, count)."""
        for number in numbers:
            with _file_errors(self._option):
                array = np.array(decode_image(self._paths[number], 3))
            yield array

    def _header(self, path: Path) -> tuple[int, int]:
        with _file_errors(self._option), open_image(path) as image:
            return image.height, image.width


class ImageNpz:
    """The images arr_0 of an npz, held in memory one at a time.

    Attributes:
        count: number of images.
        size: (H, W).

    Raises:
        EvaluationError: the file is damaged, or arr_0 is not uint8 (N, H, W, 3).
    """

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
        self.count: int = shape[0]
        self.size: tuple[int, int] = shape[1:3]

    def read(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Images uint8 (H, W, 3), for ascending numbers in [0, count)."""
        length, following = self.size[0] * self.size[1] * 3, 0
        with npz_errors(self._where), zipfile.ZipFile(self._path) as archive, archive.open("arr_0.npy") as member:
            member.read(self._start)
            for number in numbers:
                for _ in range(number - following):
                    member.read(length)  # seeking would disable zipfile's checksum test
                following = number + 1
                yield np.frombuffer(member.read(length), np.uint8).reshape(*self.size, 3)


def read_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """((shape, column-major, dtype), offset of the data) of an array in an open npz."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        header: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return header[version](member), member.tell()


@contextmanager
def _file_errors(option):
    """Turn errors about files and folders into `EvaluationError`, naming the option."""
    try:
        yield
    except (DataError, Unreadable) as error:
        raise EvaluationError(f"{option}: {error}") from error


@contextmanager
def npz_errors(where: str) -> Iterator[None]:
    """Turn any error of a damaged npz into a one-line `EvaluationError`."""
    try:
        yield
    except EvaluationError:
        raise
    except Exception as error:  # a broken archive can raise anything: BadZipFile, zlib.error, NotImplementedError, …
        raise EvaluationError(f"{where} is truncated or not an npz: {error}") from error


def array_names(option: str, path: str | Path) -> list[str]:
    """Names of the arrays in an npz; empty if the path is not a file."""
    if not Path(path).is_file():
        return []
    with npz_errors(f"{option} {path}"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_images(option: str, path: str | Path) -> ImageFolder | ImageNpz:
    """Open the images of an npz, or of a folder and its subfolders, ordered by path.

    Raises:
        EvaluationError: there are no images, or they are not all readable and of one size.
    """
    path = Path(path)
    if path.is_dir():
        with _file_errors(option):
            names = sorted(image_names(os.fsencode(path)))
        if not names:
            raise EvaluationError(f"{option} {path} contains no images ({b', '.join(ENDINGS).decode()})")
        return ImageFolder(option, [path / os.fsdecode(name) for name in names])
    if not path.is_file():
        wrong = "is neither a folder nor a file" if path.exists() else "does not exist"
        raise EvaluationError(f"{option} {path} {wrong}")
    arrays = array_names(option, path)
    if "arr_0" not in arrays:
        raise EvaluationError(f"{option} {path} has no images, arr_0, only {', '.join(arrays) or 'nothing'}")
    return ImageNpz(option, path)


def read_batches(images: ImageFolder | ImageNpz, numbers: Iterable[int], size: int) -> Iterator[torch.Tensor]:
    """Read images by number, as uint8 tensors (b, 3, H, W) with b <= size."""
    batch: list[torch.Tensor] = []
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
