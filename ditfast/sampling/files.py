"""The files of a run: numbered PNGs in a folder, a grid, an npz. Each gets its name only when it is whole."""

import filecmp
import json
import math
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ditfast.checkpoints.files import need
from ditfast.sampling import SampleError

GRID_LIMIT = 64  # images in a grid
GAP = 2  # pixels between them


class Folder:
    """Images by number, and settings.json: what each of them follows from, given its number."""

    def __init__(self, path, settings: dict):
        need("PIL.Image")  # now, not when the first image is done
        self.path, self.settings = Path(path), settings
        self._file = self.path / "settings.json"

    def image(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"

    def check(self, overwrite: bool) -> None:
        """Refuse a folder of other settings, unless it may be overwritten, and one of something else, always."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise SampleError(f"--out {self.path} is not a folder")
        if not self._file.exists() and any(self.path.iterdir()):
            raise SampleError(f"--out {self.path} holds other files, and no settings.json: choose another folder")
        differing = self._differing()
        if differing and not overwrite:
            raise SampleError(
                f"--out {self.path} holds samples of another run ({', '.join(differing)}): "
                "choose another folder, or start it over with --overwrite"
            )

    def is_complete(self, count: int) -> bool:
        """Whether the first images are all there, with these settings."""
        return not self._differing() and all(self.image(index).exists() for index in range(count))

    def start(self) -> None:
        """Make the folder ready: empty, or with finished images of the same settings."""
        with writing(self._file) as part:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._differing():
                for old in self.path.iterdir():
                    if re.fullmatch(r"\d{6,}\.png", old.name):
                        old.unlink()
            part.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def write(self, index: int, pixels: np.ndarray, note: str) -> None:
        """Image ``index`` from uint8 (Hh, Ww, 3), with a note in the file."""
        text = need("PIL.PngImagePlugin").PngInfo()
        text.add_text("Description", note)
        with writing(self.image(index)) as part:
            need("PIL.Image").fromarray(pixels).save(part, format="PNG", pnginfo=text)

    def read(self, index: int) -> np.ndarray:
        return np.asarray(need("PIL.Image").open(self.image(index)))

    def _differing(self):
        """Each setting that differs from those in the folder, as text; none where there are no settings."""
        if not self._file.exists():
            return []
        try:
            found = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return ["settings.json cannot be read"]
        now = json.loads(json.dumps(self.settings))  # tuples as lists, as in the file
        names = [name for name in now | found if now.get(name) != found.get(name)]
        return [f"{name} was {_short(found.get(name))}, is {_short(now.get(name))}" for name in names]


def check_target(option: str, path, overwrite: bool) -> None:
    """Refuse a file that exists, or has no folder to be in, before any work is done for it."""
    if path is None:
        return
    if Path(path).exists() and not overwrite:
        raise SampleError(f"{option} {path} exists: --overwrite replaces it")
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise SampleError(f"{option} must be a file in a folder that exists, got {path}")


def write_npz(path, folder: Folder, count: int) -> None:
    """The first images in the format of ADM's evaluator: arr_0, uint8 (n, Hh, Ww, 3); one in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *folder.read(0).shape)}
    with (
        writing(Path(path)) as part,
        zipfile.ZipFile(part, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for index in range(count):
            array.write(folder.read(index).tobytes())


def write_grid(path, folder: Folder, count: int, columns: int | None = None, scale: int = 1, overwrite: bool = True):
    """The first images, at most `GRID_LIMIT`, row by row, in ``columns`` or in about a square; ``scale`` enlarges it.

    Raises:
        SampleError: ``path`` is there, shows something else, and may not be overwritten.
    """
    grid = tile([folder.read(index) for index in range(min(count, GRID_LIMIT))], columns, scale)
    path = Path(path)
    with writing(path) as part:
        need("PIL.Image").fromarray(grid).save(part, format="PNG")
        if not overwrite and path.exists() and not filecmp.cmp(part, path, shallow=False):
            raise SampleError(f"--grid {path} exists and is another picture: --overwrite replaces it")


def tile(images, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """One picture of images, uint8 (n, Hh, Ww, 3): row by row, in ``columns`` or in about a square, enlarged."""
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    height, width, _ = images[0].shape
    grid = np.zeros((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid.repeat(scale, 0).repeat(scale, 1)


@contextmanager
def writing(path: Path):
    """A path to write to that becomes ``path`` in one step, or is removed.

    Raises:
        SampleError: the system refuses, as a full disk does.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise SampleError(
            f"cannot write {path}: {error.strerror or error}; finished images stay, "
            "and the same command goes on from there"
        ) from error
    finally:
        with suppress(OSError):  # where its folder is none
            part.unlink(missing_ok=True)


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
