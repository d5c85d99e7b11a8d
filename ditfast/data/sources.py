"""Open training data by name."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from ditfast.data.digits import Digits
from ditfast.data.errors import DataError
from ditfast.data.folder import Images
from ditfast.data.glyphs import Glyphs
from ditfast.data.latents import Latents
from ditfast.data.protocol import Source
from ditfast.data.shards import INDEX, STARTED
from ditfast.paths import why_unusable
from ditfast.suggest import did_you_mean

BUILT_IN: dict[str, Callable[..., Source]] = {"digits": Digits, "glyphs": Glyphs}


def open_data(name: str | Path, image_size: int | None = None, **options: Any) -> Source:
    """Open a data source.

    Args:
        name: "digits" (8 x 8, gray), "glyphs" (characters, gray), or a folder of images (`folder.Images`) or of
            latents written by `python -m ditfast.encode` (`latents.Latents`).
        image_size: height and width in pixels; None for the source's default.
        options: options of the source: flip for folders, and channels for folders of images.

    Raises:
        DataError: no such data, or an invalid size or option.
        ImportError: a required package is not installed.
    """
    name = str(name)
    if image_size is not None:
        options["image_size"] = image_size
    if name in BUILT_IN:
        return _make_source(BUILT_IN[name], options, name)
    if reason := why_unusable(name):
        raise DataError(f"data {reason}")
    if any(Path(name, file).is_file() for file in (INDEX, STARTED)):
        return _make_source(Latents, options, f"a folder of latents, {name},", folder=name)
    if Path(name).is_dir():
        return _make_source(Images, options, f"a folder of images, {name},", folder=name)
    hint = did_you_mean(name.lower(), BUILT_IN, cutoff=0.6)
    raise DataError(f"data must be {', '.join(BUILT_IN)} or a folder of images or latents, got {name!r}{hint}")


def _make_source(kind, options, name, **given):
    """Create a source after checking its options."""
    takes = signature(kind).parameters.keys() - given
    unknown = options.keys() - takes
    if unknown:
        has = f"takes {' and '.join(sorted(takes))}" if takes else "takes no options"
        raise DataError(f"{name} {has}, got {', '.join(sorted(unknown))}")
    return kind(**given, **options)
