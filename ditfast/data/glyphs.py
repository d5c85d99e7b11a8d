"""Endless synthetic images of characters in many fonts and shapes, generated from their index."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ditfast.data.errors import DataError
from ditfast.optional import import_optional

CHARACTERS = "23458ACEFHJKLMNPRTXY"  # no pairs that rotating or stretching confuses, as 6 and 9, 5 and S, 0 and O
FONTS = (  # from matplotlib; each has all of the characters
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-BoldOblique", "-Oblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-BoldOblique", "-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-BoldItalic", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "BolIta", "Italic")),
    "cmb10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
SIZES = range(16, 33)
MAP = 48  # side of a distance map in pixels; it covers [-1, 1]²
RASTER = 192  # side in pixels of the drawing it is computed from
REACH = 0.6  # half of a glyph's longer side on the map
# Ranges of a sample's parameters: half of the glyph's longer side on the image [-1, 1]², width over height, slant,
# rotation in radians, shift from the center (x, y), and outward offset of the edge, in units of the map.
LOW = torch.tensor([0.50, 0.80, -0.25, -0.25, -0.15, -0.15, -0.02], device="cpu")
HIGH = torch.tensor([0.80, 1.25, 0.25, 0.25, 0.15, 0.15, 0.06], device="cpu")


class Glyphs:
    """Endless images of characters: sample i has class i % 20; everything else depends on a seed and i.

    Font, size, proportions, slant, rotation, position and stroke width vary. Edges are one pixel wide; ink is 1,
    background -1.

    Args:
        image_size: S, height and width in pixels, 16 to 32.

    Attributes:
        shape: (1, S, S).
        num_classes, classes: 20, the characters of `CHARACTERS` in order.
        count: None, for endless.
        identity: everything that determines the samples, as JSON values, including a checksum of the fonts.

    Raises:
        DataError: another size.
        ImportError: matplotlib, which has the fonts, or pillow is not installed.
    """

    num_classes = len(CHARACTERS)
    classes = list(CHARACTERS)
    count = None

    def __init__(self, image_size: int = 16):
        if image_size not in SIZES:
            raise DataError(f"image_size of glyphs must be an integer from 16 to 32, got {image_size}")
        self.shape: tuple[int, int, int] = (1, image_size, image_size)
        self.identity = {"kind": "glyphs", "image_size": image_size, "classes": CHARACTERS, "fonts": _checksum()}

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Sample ``index``, float32 (1, S, S) in [-1, 1], and its class; its seed is drawn from ``generator``."""
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        x, y = self.batch([index], seed)
        return x[0], int(y[0])

    def batch(self, indices: Sequence[int] | np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples x, float32 (B, 1, S, S) in [-1, 1], and y, int64 (B,), each determined by its index and the seed.

        Args:
            indices: (B,) non-negative integers.
        """
        index = np.asarray(indices, dtype=np.uint64)
        draw = torch.from_numpy(_uniforms(index, seed, 1 + len(LOW)))  # (B, 8) in [0, 1)
        y = torch.from_numpy((index % self.num_classes).astype(np.int64))
        font = (draw[:, 0] * len(FONTS)).long()
        half, aspect, slant, turn, right, down, bold = (LOW + draw[:, 1:] * (HIGH - LOW)).unbind(1)
        scale = REACH / half  # map units per image unit
        wide, tall = scale / aspect.sqrt(), scale * aspect.sqrt()
        cos, sin = turn.cos(), turn.sin()
        rows = (
            torch.stack([wide * (cos + slant * sin), wide * (slant * cos - sin)], 1),
            torch.stack([tall * sin, tall * cos], 1),
        )  # image to map: rotate, slant, stretch
        matrix = torch.stack(rows, 1)  # (B, 2, 2)
        place = torch.stack([right, down], 1)[:, :, None]  # (B, 2, 1)
        theta = torch.cat([matrix, -matrix @ place], 2)
        grid = F.affine_grid(theta, [len(index), *self.shape], align_corners=False)  # (B, S, S, 2)
        maps = _maps()[font, y][:, None]  # (B, 1, MAP, MAP)
        distance = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        pixel = scale * 2 / self.shape[-1]  # side of an image pixel, in map units
        ink = 0.5 - (distance - bold[:, None, None, None]) / pixel[:, None, None, None]  # coverage, from the center
        return ink.clamp(0, 1) * 2 - 1, y


@lru_cache(1)
def _maps():
    """Signed distance to the edge of each glyph, negative inside: (fonts, characters, MAP, MAP) in map units."""
    maps = [[_distance(_draw(_font_file(name), character)) for character in CHARACTERS] for name in FONTS]
    return torch.stack([torch.stack(row) for row in maps])


def _draw(file, character):
    """The centered glyph as booleans (RASTER, RASTER); its longer side spans `REACH` of the raster."""
    font = import_optional("PIL.ImageFont").truetype(str(file), RASTER)
    left, top, right, bottom = font.getbbox(character)
    size = round(RASTER * RASTER * REACH / max(right - left, bottom - top))
    font = font.font_variant(size=size)
    left, top, right, bottom = font.getbbox(character)
    image = import_optional("PIL.Image").new("L", (RASTER, RASTER))
    at = (RASTER - left - right) / 2, (RASTER - top - bottom) / 2
    import_optional("PIL.ImageDraw").Draw(image).text(at, character, fill=255, font=font)
    return torch.from_numpy(np.asarray(image) > 127)


def _distance(ink):
    """From booleans (R, R), the signed distance of the map's pixel centers to the nearest edge, (MAP, MAP)."""
    # (E, 2): row, column of edges
    across = (ink[:, 1:] != ink[:, :-1]).nonzero() + torch.tensor([0.5, 1.0], device="cpu")
    along = (ink[1:] != ink[:-1]).nonzero() + torch.tensor([1.0, 0.5], device="cpu")
    step = RASTER / MAP
    center = (torch.arange(MAP, device="cpu") + 0.5) * step
    points = torch.cartesian_prod(center, center)  # (MAP², 2)
    distance = torch.cdist(points, torch.cat([across, along])).amin(1).view(MAP, MAP) * 2 / RASTER
    inside = ink[center.long()][:, center.long()]
    return torch.where(inside, -distance, distance)


def _uniforms(index, seed, count):
    """``count`` numbers in [0, 1) for each index uint64 (B,): float32 (B, count).

    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(index + np.uint64(1)) + np.uint64(seed % 2**64))
        counter = key[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(counter) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _font_file(name):
    return Path(import_optional("matplotlib").get_data_path(), "fonts", "ttf", f"{name}.ttf")


@lru_cache(1)
def _checksum():
    digest = hashlib.sha256()
    for name in FONTS:
        digest.update(_font_file(name).read_bytes())
    return digest.hexdigest()[:16]
