"""Characters in many fonts and shapes: images that never repeat, made from their number."""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ditfast.data.errors import DataError
from ditfast.optional import import_optional

CHARACTERS = "23458ACEFHJKLMNPRTXY"  # no pair that a turn or a stretch confuses, such as 6 and 9, 5 and S, 0 and O
FONTS = (  # of matplotlib; each has all of the characters
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
MAP = 48  # pixels of a distance map; it shows [-1, 1]²
RASTER = 192  # pixels of the drawing that it is measured on
REACH = 0.6  # half of a glyph's longer side on the map
# A sample's glyph: half of its longer side on the image [-1, 1]², width over height, slant, turn in radians, shift
# from the middle, and how far its edge moves out, in units of the map.
LOW = torch.tensor([0.50, 0.80, -0.25, -0.25, -0.15, -0.15, -0.02], device="cpu")
HIGH = torch.tensor([0.80, 1.25, 0.25, 0.25, 0.15, 0.15, 0.06], device="cpu")


class Glyphs:
    """Endless images of characters: sample i has the class i % 20, and everything else from a seed and i.

    Font, size, proportions, slant, turn, place and stroke vary. Edges are smooth over a pixel, ink is 1, paper -1.

    Args:
        image_size: S, height and width in pixels, 16 to 32.

    Attributes:
        shape: (1, S, S).
        num_classes, classes: 20, the characters of `CHARACTERS` in order.
        count: None, for endless.
        identity: what the samples follow from, as JSON values, with a checksum of the fonts.

    Raises:
        DataError: another size.
        ImportError: matplotlib, whose fonts these are, or pillow is not installed.
    """

    num_classes, classes, count = len(CHARACTERS), list(CHARACTERS), None

    def __init__(self, image_size: int = 16):
        if image_size not in SIZES:
            raise DataError(f"image_size of glyphs must be a whole number from 16 to 32, got {image_size}")
        self.shape = (1, image_size, image_size)
        self.identity = {"kind": "glyphs", "image_size": image_size, "classes": CHARACTERS, "fonts": _checksum()}

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Sample ``index``, float32 (1, S, S) in [-1, 1], and its class; one draw of ``generator`` is the seed."""
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        x, y = self.batch([index], seed)
        return x[0], int(y[0])

    def batch(self, indices, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples by number: x float32 (B, 1, S, S) in [-1, 1] and y int64 (B,), each from its number and the seed.

        Args:
            indices: (B,) whole numbers, none negative.
        """
        index = np.asarray(indices, dtype=np.uint64)
        draw = torch.from_numpy(_uniforms(index, seed, 1 + len(LOW)))  # (B, 8) in [0, 1)
        y = torch.from_numpy((index % self.num_classes).astype(np.int64))
        font = (draw[:, 0] * len(FONTS)).long()
        half, aspect, slant, turn, right, down, bold = (LOW + draw[:, 1:] * (HIGH - LOW)).unbind(1)
        scale = REACH / half  # units of the map in one of the image
        wide, tall = scale / aspect.sqrt(), scale * aspect.sqrt()
        cos, sin = turn.cos(), turn.sin()
        rows = (
            torch.stack([wide * (cos + slant * sin), wide * (slant * cos - sin)], 1),
            torch.stack([tall * sin, tall * cos], 1),
        )  # image to map: turn, slant, stretch
        matrix = torch.stack(rows, 1)  # (B, 2, 2)
        place = torch.stack([right, down], 1)[:, :, None]  # (B, 2, 1)
        theta = torch.cat([matrix, -matrix @ place], 2)
        grid = F.affine_grid(theta, (len(index), *self.shape), align_corners=False)  # (B, S, S, 2)
        maps = _maps()[font, y][:, None]  # (B, 1, MAP, MAP)
        distance = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        pixel = scale * 2 / self.shape[-1]  # of the image, in units of the map
        ink = 0.5 - (distance - bold[:, None, None, None]) / pixel[:, None, None, None]  # of a pixel, by its middle
        return ink.clamp(0, 1) * 2 - 1, y


@lru_cache(1)
def _maps():
    """Each glyph's distance to its edge, negative in the ink: (fonts, characters, MAP, MAP) in units of the map."""
    maps = [[_distance(_draw(_font_file(name), character)) for character in CHARACTERS] for name in FONTS]
    return torch.stack([torch.stack(row) for row in maps])


def _draw(file, character):
    """The glyph, centred, as booleans (RASTER, RASTER); its longer side takes up `REACH` of them."""
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
    """From booleans (R, R), the signed distance of a map's (MAP, MAP) pixel centres to the nearest edge."""
    across = (ink[:, 1:] != ink[:, :-1]).nonzero() + torch.tensor(
        [0.5, 1.0], device="cpu"
    )  # (E, 2): row, column of edges
    along = (ink[1:] != ink[:-1]).nonzero() + torch.tensor([1.0, 0.5], device="cpu")
    step = RASTER / MAP
    centre = (torch.arange(MAP, device="cpu") + 0.5) * step
    points = torch.cartesian_prod(centre, centre)  # (MAP², 2)
    distance = torch.cdist(points, torch.cat([across, along])).amin(1).view(MAP, MAP) * 2 / RASTER
    inside = ink[centre.long()][:, centre.long()]
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
