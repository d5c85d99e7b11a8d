"""Images in files: which files are images, and what their pixels are. Training, encoding and evaluation share this.

A file counts by its ending, its format by its content. Hidden files and folders are passed over, as `._a.png` is no
image. Pixels are 8 bits in grey or RGB, as Pillow converts them: transparency is dropped, colour profiles and EXIF's
orientation are ignored (Pillow itself turns a TIFF), and the first image of several is taken. So do torchvision's
ImageFolder and ADM, with which the published statistics were made. Of 16 bits the upper 8 are taken, in grey as
Pillow does it in colour. Floats and integers of 32 bits have no white that is known, and are refused.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ditfast.data.errors import DataError, Unreadable
from ditfast.optional import import_optional

ENDINGS = (b".bmp", b".jpeg", b".jpg", b".pgm", b".png", b".ppm", b".tif", b".tiff", b".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS, for which Pillow starts another program
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


def is_image(name) -> bool:
    """Whether a file of this name is read as an image."""
    return os.fsencode(name).lower().endswith(ENDINGS)


def image_names(folder: bytes, inside=b"") -> Iterator[bytes]:
    """The paths of all images in a folder and those in it, below ``folder``."""
    for name, is_folder in visible_entries(folder):
        if is_folder:
            yield from image_names(folder + b"/" + name, inside + name + b"/")
        elif is_image(name):
            yield inside + name


def visible_entries(folder) -> list[tuple]:
    """Names in a folder that are not hidden, and whether each is a folder, which takes no look at every file."""
    try:
        with os.scandir(folder) as entries:
            return [(each.name, each.is_dir()) for each in entries if os.fsencode(each.name)[:1] != b"."]
    except OSError as error:  # a folder without permission, links in a circle
        raise DataError(f"{os.fsdecode(folder)} cannot be read: {error.strerror}") from error


def decode_image(path, channels: int):
    """The whole image as Pillow's, in grey (channels 1) or RGB (3).

    Raises:
        Unreadable: the file is missing, truncated, no image, of more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels, or
            of numbers that are neither 8 nor 16 bits.
    """
    with open_image(path) as image:
        return _to_8_bits(image).convert(MODES[channels])  # decodes it


@contextmanager
def open_image(path):
    """The Pillow image of a file, of which the header has been read: whatever goes wrong inside is `Unreadable`."""
    pil = import_optional("PIL.Image")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
            raise Unreadable(f"{path} is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's do not name the file
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
        raise Unreadable(f"{path} has no pixels, its size is {image.width} x {image.height}")
    if image.mode[0] in "FI" and not _is_16_bits(image):
        kind = {"F": "floats", "I": "integers of 32 bits"}.get(image.mode, "integers with another black or white")
        raise Unreadable(f"{path} must have 8 or 16 bits per channel, got {kind}")


def _is_16_bits(image):
    """Whether it is grey from 0 to 65535; PGM's are scaled to that, and in 32 bits, as PNG's before Pillow 11."""
    if image.format == "TIFF":
        depth, white = image.tag_v2.get(258), image.tag_v2.get(262)  # BitsPerSample, PhotometricInterpretation
        return image.mode.startswith("I;16") and (depth, white) == ((16,), 1)
    return image.mode.startswith("I;16") or image.mode == "I"


def _to_8_bits(image):
    if not _is_16_bits(image):
        return image
    return import_optional("PIL.Image").fromarray((np.asarray(image) >> 8).astype(np.uint8))
