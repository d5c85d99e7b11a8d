"""Image files: which files are images, and how they become pixels; shared by training, encoding and evaluation.

Images are found by file extension and decoded by content. Hidden files and folders, such as ._a.png, are skipped.
Pixels are 8-bit gray or RGB, as converted by Pillow: transparency is dropped, color profiles and EXIF orientation are
ignored (except in TIFF, where Pillow applies it), and the first of several frames is used. torchvision's ImageFolder
and ADM, which produced the published statistics, do likewise. 16-bit images keep their upper 8 bits, in gray as
Pillow does in color. Floats and 32-bit integers are rejected, since their white level is unknown.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, AnyStr

import numpy as np

from ditfast.data.errors import DataError, Unreadable
from ditfast.optional import import_optional

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (b".bmp", b".jpeg", b".jpg", b".pgm", b".png", b".ppm", b".tif", b".tiff", b".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, for which Pillow runs another program
MODES = {1: "L", 3: "RGB"}  # number of channels -> Pillow mode


def is_image(name: str | bytes) -> bool:
    """Whether a file of this name is read as an image."""
    return os.fsencode(name).lower().endswith(ENDINGS)


def image_names(folder: bytes, inside: bytes = b"") -> Iterator[bytes]:
    """Paths of all images in a folder and its subfolders, relative to ``folder``."""
    for name, is_folder in visible_entries(folder):
        if is_folder:
            yield from image_names(folder + b"/" + name, inside + name + b"/")
        elif is_image(name):
            yield inside + name


def visible_entries(folder: AnyStr | Path) -> list[tuple[AnyStr, bool]]:
    """(name, is a folder) of each entry in a folder that is not hidden, without a stat call per file."""
    try:
        with os.scandir(folder) as entries:
            return [(each.name, each.is_dir()) for each in entries if os.fsencode(each.name)[:1] != b"."]  # type: ignore[misc]
    except OSError as error:  # for example missing permission or circular links
        raise DataError(f"{os.fsdecode(folder)} cannot be read: {error.strerror}") from error


def decode_image(path: str | Path, channels: int) -> "Image":
    """Decode an image to gray (channels 1) or RGB (channels 3).

    Raises:
        Unreadable: the file is missing, truncated or not an image, has more than 2 * PIL.Image.MAX_IMAGE_PIXELS
            pixels, or channels of neither 8 nor 16 bits.
    """
    with open_image(path) as image:
        return _to_8_bits(image).convert(MODES[channels])  # decodes it


@contextmanager
def open_image(path: str | Path) -> Iterator["Image"]:
    """Context with a file's Pillow image, of which only the header has been read; all errors become `Unreadable`."""
    pil = import_optional("PIL.Image")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
            raise Unreadable(f"{path} is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings do not name the file
            with pil.open(path, formats=FORMATS) as image:
                _check_header(path, image)
                yield image
    except Unreadable:
        raise
    except pil.UnidentifiedImageError as error:
        raise Unreadable(f"{path} is not an image ({', '.join(FORMATS)})") from error
    except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error, EOFError, …
        reason = getattr(error, "strerror", None) or f"{error}" or type(error).__name__
        raise Unreadable(f"{path} cannot be read: {reason.splitlines()[0]}") from error


def _check_header(path, image):
    if min(image.size) < 1:
        raise Unreadable(f"{path} has no pixels: {image.width} x {image.height}")
    if image.mode[0] in "FI" and not _is_16_bits(image):
        kind = {"F": "floats", "I": "32-bit integers"}.get(image.mode, "integers with a nonstandard range")
        raise Unreadable(f"{path} must have 8 or 16 bits per channel, got {kind}")


def _is_16_bits(image):
    """Whether it is gray from 0 to 65535. Pillow scales PGM to that range, in 32 bits, like PNG before Pillow 11."""
    if image.format == "TIFF":
        depth, white = image.tag_v2.get(258), image.tag_v2.get(262)  # BitsPerSample, PhotometricInterpretation
        return image.mode.startswith("I;16") and (depth, white) == ((16,), 1)
    return image.mode.startswith("I;16") or image.mode == "I"


def _to_8_bits(image):
    if not _is_16_bits(image):
        return image
    return import_optional("PIL.Image").fromarray((np.asarray(image) >> 8).astype(np.uint8))
