"""Every kind of file gives the same pixels in training, encoding and evaluation, or a one-line error naming it."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.data import Unreadable, open_data
from ditfast.data.image_files import decode_image
from ditfast.data.preprocess import to_tensor
from ditfast.evaluation import EvaluationError
from ditfast.evaluation.images import open_images

SIDE = 8
COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (SIDE, SIDE), np.uint16)
PICTURE, GREY = Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0])


def png(width, height, depth, colour, rows, header=None):
    """The bytes of a PNG whose header may be wrong."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0) if header is None else header
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def deep_png(channels, colour):
    values = np.random.default_rng(2).integers(0, 2**16, (SIDE, SIDE, channels)).astype(">u2")
    return png(SIDE, SIDE, 16, colour, [row.tobytes() for row in values]), (values >> 8).astype(np.uint8)


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    return exif


def palette():
    return GREY.quantize(200)


def rgb(image):
    return np.asarray(image.convert("RGB"))


RGB_16, RGB_16_UPPER = deep_png(3, 2)
GREY_ALPHA_16, GREY_ALPHA_16_UPPER = deep_png(2, 4)
UPPER = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, 2)
GREYS = np.repeat(COLOURS[..., :1], 3, 2)
KINDS = {  # file: (what creates it, its RGB bytes)
    "i16.png": (lambda path: Image.fromarray(DEEP).save(path), UPPER),
    "i16.tif": (lambda path: Image.fromarray(DEEP).save(path), UPPER),
    "big-endian.tif": (lambda path: Image.fromarray(DEEP.astype(">u2")).save(path), UPPER),
    "i16.pgm": (lambda path: path.write_bytes(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes()), UPPER),
    "rgb16.png": (lambda path: path.write_bytes(RGB_16), RGB_16_UPPER),
    "la16.png": (lambda path: path.write_bytes(GREY_ALPHA_16), GREY_ALPHA_16_UPPER[..., [0, 0, 0]]),
    "one.png": (lambda path: GREY.convert("1").save(path), rgb(GREY.convert("1"))),
    "grey.bmp": (lambda path: GREY.save(path), GREYS),
    "la.png": (lambda path: GREY.convert("LA").save(path), GREYS),
    "palette.png": (lambda path: palette().save(path), rgb(palette())),
    "see-through.png": (lambda path: palette().save(path, transparency=bytes(range(200))), rgb(palette())),
    "rgba.webp": (lambda path: _clear().save(path, lossless=True, exact=True), COLOURS),
    "cmyk.tif": (lambda path: PICTURE.convert("CMYK").save(path), COLOURS),
    "turned.png": (lambda path: PICTURE.save(path, exif=oriented()), COLOURS),
    "turned.webp": (lambda path: PICTURE.save(path, lossless=True, exif=oriented()), COLOURS),
    "several.tif": (lambda path: PICTURE.save(path, save_all=True, append_images=[PICTURE.rotate(90)]), COLOURS),
    "gif.png": (lambda path: palette().save(path, format="GIF"), rgb(palette())),
    "png.JPEG": (lambda path: PICTURE.save(path, format="PNG"), COLOURS),
}


def _clear():
    image = PICTURE.convert("RGBA")
    image.putalpha(0)
    return image


@pytest.mark.parametrize("name", KINDS)
def test_training_and_evaluation_see_the_same_pixels(name, tmp_path):
    save, expected = KINDS[name]
    (tmp_path / "class").mkdir()
    save(tmp_path / "class" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none reaches the user
        x, _ = open_data(tmp_path, SIDE, flip=False).read(0, None)
        (evaluated,) = open_images("--samples", tmp_path).read([0])
    np.testing.assert_array_equal(evaluated, expected)
    assert torch.equal(x, to_tensor(Image.fromarray(expected)))


def test_jpegs_of_every_kind(tmp_path):
    """JPEG changes colors a little; a rotation or inverted ink would show."""
    smooth = Image.fromarray(np.linspace(30, 220, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8))
    smooth.save(tmp_path / "turned.jpg", quality=95, exif=oriented())
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    smooth.save(tmp_path / "two.jpg", format="MPO", quality=95, save_all=True, append_images=[smooth.rotate(180)])
    for name in ("turned.jpg", "cmyk.jpg", "two.jpg"):
        found = np.asarray(decode_image(tmp_path / name, 3)).astype(int)
        assert found.shape == (16, 24, 3) and np.abs(found - np.asarray(smooth)).max() < 16, name


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_grey_is_pillows(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    PICTURE.convert(mode).save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode and decode_image(path, 1).tobytes() == saved.convert("L").tobytes()


def tiff(bits):
    """A pixel value of 2, which a 16-bit reader takes for less than white."""
    fields = {256: 2, 257: 1, 258: bits, 259: 1, 262: 1, 273: 110, 277: 1, 279: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4) + b"\xff" * 4


def holds(content):
    return lambda path: path.write_bytes(content)


def saved(array):
    return Image.fromarray(array).save


REFUSED = {  # file: (what creates it, what is wrong)
    "float.tif": (saved(np.ones((4, 4), np.float32)), "must have 8 or 16 bits per channel, got floats"),
    "float.ppm": (holds(b"Pf 2 2 -1.0\n" + bytes(16)), "got floats"),
    "int.tif": (saved(np.ones((4, 4), np.int32)), "got 32-bit integers"),
    "12.tif": (holds(tiff(12)), "got integers with a nonstandard range"),
    "no-header.png": (holds(png(0, 0, 8, 2, [], header=b"")), "IHDR"),
    "empty.png": (holds(png(0, 0, 8, 2, [])), "(is not an image|has no pixels|cannot be read: .)"),
    "bomb.png": (holds(png(20_000, 20_000, 8, 2, [])), r"Image size \(400000000 pixels\) exceeds limit"),
    "eps.png": (lambda path: PICTURE.save(path, format="EPS"), r"is not an image \(BMP, GIF, JPEG, PNG, "),
    "pipe.png": (lambda path: os.mkfifo(path), "is not a regular file"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "gone.png": (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
    "nothing.png": (holds(b""), "is not an image"),
    "text.png": (holds(b"text\n" * 30), "is not an image"),
    "zeros.png": (holds(b"\x89PNG\r\n\x1a\n" + bytes(60)), "(is not an image|cannot be read: .)"),
}


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and links")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_an_image_is_named_in_one_line(name, tmp_path):
    make, wrong = REFUSED[name]
    (tmp_path / "class").mkdir()
    make(tmp_path / "class" / name)
    with pytest.raises(Unreadable, match=f"{name} .*{wrong}") as raised:
        open_data(tmp_path, SIDE).read(0, None)
    with pytest.raises(EvaluationError, match=f"^--samples: .*{name} .*{wrong}") as refused:
        open_images("--samples", tmp_path)
    assert "\n" not in str(raised.value) + str(refused.value)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_truncated_file_is_named(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save(path)
    content = path.read_bytes()
    assert decode_image(path, 3).size == (64, 48)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match=rf"a\.{ending} cannot be read: ") as raised:
        decode_image(path, 3)
    assert "\n" not in str(raised.value)


def test_a_large_image_causes_no_warning(tmp_path, monkeypatch):
    """Pillow warns above MAX_IMAGE_PIXELS, without naming the file, and rejects twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    PICTURE.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(tmp_path / "a.png", 3).size == (SIDE, SIDE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(Unreadable, match=r"a\.png cannot be read: Image size \(64 pixels\) exceeds limit of 60"):
        decode_image(tmp_path / "a.png", 3)
