"""A sample's pixels, compared with a plain float64 resampling."""

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast.data.preprocess import center_crop, to_tensor


def picture(width, height, seed=0):
    """Smooth colors with some noise: no two places are equal, and no filter rings at every pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(float)
    waves = np.stack([128 + 100 * np.sin(x / (3 + k) + y / (5 - k) + k) for k in range(3)], -1)
    return Image.fromarray((waves + rng.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8))


def box(t):
    return ((t > -0.5) & (t <= 0.5)).astype(float)


def bicubic(t):
    t = np.abs(t)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2  # a = -1/2
    return np.where(t < 1, near, np.where(t < 2, far, 0))


def weights(kernel, inside, outside):
    """(outside, inside): when the image shrinks, the kernel is stretched so that it covers every pixel."""
    scale = inside / outside
    centre = (np.arange(outside) + 0.5) * scale
    rows = kernel((np.arange(inside) - centre[:, None] + 0.5) * (1 / max(scale, 1)))
    return rows / rows.sum(1, keepdims=True)


def resize(pixels, width, height, kernel):
    """Resize rows first; round to bytes after each direction."""
    across = np.einsum("ow,hwc->hoc", weights(kernel, pixels.shape[1], width), pixels.astype(float))
    return to_bytes(np.einsum("oh,hwc->owc", weights(kernel, pixels.shape[0], height), to_bytes(across)))


def to_bytes(pixels):
    return np.floor(pixels.clip(0, 255) + 0.5)


def expected(image, size):
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        pixels = resize(pixels, width, height, box)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    pixels = resize(pixels, width, height, bicubic)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


SIZES = [
    *((16, 16), (31, 31), (32, 32), (33, 47), (64, 32), (63, 64)),  # around one, two and four times the crop's size
    *((131, 67), (67, 131), (39, 200), (303, 40)),  # odd, with odd halves: a box filter does not end mid-pixel
    *((5, 5), (1, 3), (9, 4), (15, 23)),  # smaller than the crop
]
TOLERANCE = 2  # bytes: Pillow's weights are in fixed point, and each pass rounds


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_center_crop(width, height):
    image = picture(width, height)
    got = np.asarray(center_crop(image, 16))
    assert got.shape == (16, 16, 3) and got.dtype == np.uint8
    np.testing.assert_allclose(got.astype(float), expected(image, 16), atol=TOLERANCE)


def test_bicubic_alone_differs():
    """Without halving the result differs, so the test above would notice."""
    image = picture(131, 67)
    alone = resize(np.asarray(image), round(131 * 16 / 67), 16, bicubic)
    left = (alone.shape[1] - 16) // 2
    assert np.abs(alone[:, left : left + 16] - expected(image, 16)).max() > 8


def test_odd_size():
    image = picture(70, 43)
    np.testing.assert_allclose(np.asarray(center_crop(image, 13)).astype(float), expected(image, 13), atol=TOLERANCE)


def test_the_crop_is_the_middle():
    """An odd remainder is cut off at the right and the bottom."""
    pixels = np.zeros((4, 9, 3), np.uint8)
    pixels[:, 2:6] = 255
    assert (np.asarray(center_crop(Image.fromarray(pixels), 4)) == 255).all()
    assert (np.asarray(center_crop(Image.fromarray(pixels.transpose(1, 0, 2)), 4)) == 255).all()


@pytest.mark.parametrize(("mode", "shape"), [("RGB", (3, 2, 3)), ("L", (1, 2, 3))])
def test_tensor_is_in_unit_range(mode, shape):
    image = Image.new(mode, (3, 2))
    image.putpixel((2, 1), 255 if mode == "L" else (255, 51, 0))
    x = to_tensor(image)
    assert x.shape == shape and x.dtype == torch.float32 and x.is_contiguous()
    assert x[0, 1, 2] == 1 and x[0, 0, 0] == -1
    if mode == "RGB":
        torch.testing.assert_close(x[:, 1, 2], torch.tensor([1, -0.6, -1]))
