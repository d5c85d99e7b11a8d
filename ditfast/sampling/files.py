"""The files of a run: numbered PNGs in a folder, a grid, an npz. Each is written atomically."""

import filecmp
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ditfast.optional import import_optional
from ditfast.resumable import ResumableFolder
from ditfast.sampling import SampleError

HEAD, TAIL = ">8sI4sIIBB", b"\0\0\0\0IEND\xaeB`\x82"  # of a PNG: signature, IHDR's length, name and content; IEND
GRID_PIXELS = 89_478_485  # the most that Pillow opens without a warning
GRID_SIDE = 2**16 - 1  # the most that a GIF has
GRID_LIMIT = 64  # images
GAP = 2  # pixels between images
_OTHERWISE = "choose another {}, or replace it with --overwrite"


class SampleFolder(ResumableFolder):
    """Numbered images, and settings.json with the settings that, with its number, determine each image.

    Args:
        path: the folder.
        settings: JSON values.
        size: (Hh, Ww) of every image.
    """

    record, holds, pattern, error = "settings.json", "images", r"\d{6,}\.png", SampleError

    def __init__(self, path: str | Path, settings: dict, size: tuple[int, int]):
        self.size = size
        import_optional("PIL.Image")  # fail now, not when the first image is done
        super().__init__(path, settings)

    def image(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def is_complete(self, count: int) -> bool:
        """Whether the folder has the first ``count`` images, with these settings."""
        return not self.differences() and all(map(self.is_whole, range(count)))

    def is_whole(self, index: int) -> bool:
        """Whether image ``index`` exists, with the right size, in RGB, not truncated; only its ends are read."""
        height, width = self.size
        head = struct.pack(HEAD, b"\x89PNG\r\n\x1a\n", 13, b"IHDR", width, height, 8, 2)  # 8 bits, RGB
        try:
            with open(self.image(index), "rb") as file:
                if file.read(len(head)) != head:
                    return False
                file.seek(-len(TAIL), os.SEEK_END)
                return file.read() == TAIL
        except OSError:  # missing, or shorter than that
            return False

    def write(self, index: int, pixels: np.ndarray, note: str) -> None:
        """Write image ``index`` from uint8 (Hh, Ww, 3), with ``note`` as its description."""
        text = import_optional("PIL.PngImagePlugin").PngInfo()
        text.add_text("Description", note)
        with self.writing(self.image(index)) as part:
            import_optional("PIL.Image").fromarray(pixels).save(part, format="PNG", pnginfo=text)

    def read(self, index: int) -> np.ndarray:
        return np.asarray(import_optional("PIL.Image").open(self.image(index)))


def check_target(option: str, path: str | Path | None, overwrite: bool) -> None:
    """Reject an output file that exists, or whose folder does not.

    Raises:
        SampleError: naming the option and the path.
    """
    if path is None:
        return
    if Path(path).exists() and not overwrite:
        raise SampleError(f"{option} {path} exists: {_OTHERWISE.format(option)}")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise SampleError(f"{option} must be a file in a folder that exists, got {path}")


def check_apart(out: str | Path, targets: dict[str, str | None]) -> None:
    """Reject output files that would replace each other, or an image of the folder ``out``.

    Args:
        targets: option -> path.

    Raises:
        SampleError: naming the option and the path.
    """
    taken: dict[Path, str] = {}
    for option, path in targets.items():
        place = Path(path or "").resolve()
        if path and place.parent == Path(out).resolve() and re.fullmatch(SampleFolder.pattern, place.name):
            raise SampleError(f"{option} must not be an image of --out, got {path}")
        if path and (other := taken.setdefault(place, option)) != option:
            raise SampleError(f"{option} must be another file than {other}, got {path}")


def write_npz(path: str | Path, folder: SampleFolder, count: int, overwrite: bool = True) -> None:
    """Write the first images for ADM's evaluator: arr_0, uint8 (n, Hh, Ww, 3), with one in memory at a time.

    Raises:
        SampleError: ``path`` has other content and ``overwrite`` is false.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *folder.read(0).shape)}

    def save(part):
        with zipfile.ZipFile(part, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index in range(count):
                array.write(folder.read(index).tobytes())

    replace("--npz", path, folder, save, overwrite)


def write_grid(
    path: str | Path,
    folder: SampleFolder,
    count: int,
    columns: int | None = None,
    scale: int = 1,
    overwrite: bool = True,
) -> None:
    """Write the first images, at most `GRID_LIMIT`, as one PNG; see `tile_images`.

    Raises:
        SampleError: ``path`` has other content and ``overwrite`` is false.
    """
    grid = tile_images([folder.read(index) for index in range(min(count, GRID_LIMIT))], columns, scale)
    picture = import_optional("PIL.Image").fromarray(grid)
    replace("--grid", path, folder, lambda part: picture.save(part, format="PNG"), overwrite)


def replace(
    option: str, path: str | Path, folder: SampleFolder, save: Callable[[Path], None], overwrite: bool
) -> None:
    """Write a file of some of the folder's images.

    Raises:
        SampleError: ``path`` has other content and ``overwrite`` is false.
    """
    path = Path(path)
    with folder.writing(path) as part:
        save(part)
        if not overwrite and path.exists() and not filecmp.cmp(part, path, shallow=False):
            raise SampleError(f"{option} {path} exists and shows other images: {_OTHERWISE.format(option)}")


def check_grid(size: tuple[int, int], count: int, columns: int | None, scale: int) -> None:
    """Reject a grid of ``count`` images of ``size`` (Hh, Ww) with more than `GRID_PIXELS`, or `GRID_SIDE` per side.

    Raises:
        SampleError: naming the option, its value and the limit.
    """
    _, *sides = _layout(*size, min(count, GRID_LIMIT), columns)
    height, width = (side * scale for side in sides)
    if height * width > GRID_PIXELS or max(height, width) > GRID_SIDE:
        rule = f"at most {GRID_PIXELS} pixels, and {GRID_SIDE} per side"
        raise SampleError(f"--grid-scale {scale} makes the grid {width} x {height}: it must have {rule}")


def _layout(height, width, count, columns):
    """Columns, height and width of a grid of images, before scaling."""
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    return columns, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP


def tile_images(images: Sequence[np.ndarray] | np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Tile images, uint8 (n, Hh, Ww, 3), row by row into one.

    Args:
        columns: images per row; None for about a square.
        scale: enlarges each pixel to scale x scale.
    """
    height, width, _ = images[0].shape
    columns, *sides = _layout(height, width, len(images), columns)
    grid = np.zeros((*sides, 3), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, 0).repeat(scale, 1)
