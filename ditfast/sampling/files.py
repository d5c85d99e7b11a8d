"""The files of a run: numbered PNGs in a folder, a grid, an npz. Each gets its name only when it is whole."""

import filecmp
import math
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from ditfast.optional import import_optional
from ditfast.resumable import ResumableFolder
from ditfast.sampling import SampleError

HEAD, TAIL = ">8sI4sIIBB", b"\0\0\0\0IEND\xaeB`\x82"  # of a PNG: signature, header's length, name, content; its end
GRID_PIXELS = 89_478_485  # the most that Pillow opens without a warning
GRID_LIMIT = 64  # images in a grid
GAP = 2  # pixels between them


class SampleFolder(ResumableFolder):
    """Images by number, and settings.json: what each of them follows from, given its number; ``size`` is (Hh, Ww)."""

    record, holds, pattern, error = "settings.json", "images", r"\d{6,}\.png", SampleError

    def __init__(self, path, settings: dict, size: tuple[int, int]):
        self.size = size
        import_optional("PIL.Image")  # now, not when the first image is done
        super().__init__(path, settings)

    def image(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def is_complete(self, count: int) -> bool:
        """Whether the first images are all there, with these settings."""
        return not self.differences() and all(map(self.is_whole, range(count)))

    def is_whole(self, index: int) -> bool:
        """Whether an image is there, of its size, in RGB and not cut; what is between its ends is not read."""
        height, width = self.size
        head = struct.pack(HEAD, b"\x89PNG\r\n\x1a\n", 13, b"IHDR", width, height, 8, 2)  # 8 bits, RGB
        try:
            with open(self.image(index), "rb") as file:
                if file.read(len(head)) != head:
                    return False
                file.seek(-len(TAIL), os.SEEK_END)
                return file.read() == TAIL
        except OSError:  # none, or shorter than that
            return False

    def write(self, index: int, pixels: np.ndarray, note: str) -> None:
        """Image ``index`` from uint8 (Hh, Ww, 3), with a note in the file."""
        text = import_optional("PIL.PngImagePlugin").PngInfo()
        text.add_text("Description", note)
        with self.writing(self.image(index)) as part:
            import_optional("PIL.Image").fromarray(pixels).save(part, format="PNG", pnginfo=text)

    def read(self, index: int) -> np.ndarray:
        return np.asarray(import_optional("PIL.Image").open(self.image(index)))


def check_target(option: str, path, overwrite: bool) -> None:
    """Refuse a file that exists, or has no folder to be in, before any work is done for it."""
    if path is None:
        return
    if Path(path).exists() and not overwrite:
        raise SampleError(f"{option} {path} exists: --overwrite replaces it")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise SampleError(f"{option} must be a file in a folder that exists, got {path}")


def write_npz(path, folder: SampleFolder, count: int, overwrite: bool = True) -> None:
    """The first images in the format of ADM's evaluator: arr_0, uint8 (n, Hh, Ww, 3); one in memory at a time.

    Raises:
        SampleError: ``path`` is there, holds something else, and may not be overwritten.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *folder.read(0).shape)}
    path = Path(path)
    with folder.writing(path) as part:
        with zipfile.ZipFile(part, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for index in range(count):
                array.write(folder.read(index).tobytes())
        if not overwrite and path.exists() and not filecmp.cmp(part, path, shallow=False):
            raise SampleError(f"--npz {path} exists and holds other images: --overwrite replaces it")


def write_grid(
    path, folder: SampleFolder, count: int, columns: int | None = None, scale: int = 1, overwrite: bool = True
):
    """The first images, at most `GRID_LIMIT`, row by row, in ``columns`` or in about a square; ``scale`` enlarges it.

    Raises:
        SampleError: ``path`` is there, shows something else, and may not be overwritten.
    """
    grid = tile_images([folder.read(index) for index in range(min(count, GRID_LIMIT))], columns, scale)
    path = Path(path)
    with folder.writing(path) as part:
        import_optional("PIL.Image").fromarray(grid).save(part, format="PNG")
        if not overwrite and path.exists() and not filecmp.cmp(part, path, shallow=False):
            raise SampleError(f"--grid {path} exists and is another picture: --overwrite replaces it")


def check_grid(size: tuple[int, int], count: int, columns: int | None, scale: int) -> None:
    """Refuse a grid of so many images of ``size`` (Hh, Ww) that is too large, before any is made."""
    _, *sides = _layout(*size, min(count, GRID_LIMIT), columns)
    height, width = (side * scale for side in sides)
    if height * width > GRID_PIXELS:
        raise SampleError(
            f"--grid-scale {scale} makes a picture of {width} x {height}: it must have at most {GRID_PIXELS} pixels"
        )


def _layout(height, width, count, columns):
    """Columns, height and width of a grid of images, before it is enlarged."""
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    return columns, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP


def tile_images(images, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """One picture of images, uint8 (n, Hh, Ww, 3): row by row, in ``columns`` or in about a square, enlarged."""
    height, width, _ = images[0].shape
    columns, *sides = _layout(height, width, len(images), columns)
    grid = np.zeros((*sides, 3), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, 0).repeat(scale, 1)
