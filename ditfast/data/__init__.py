"""Training data: sources of samples, and the stream of batches from one of them.

A source is an object with

    shape: tuple[int, int, int]   (C, H, W) of a sample as the model sees it: pixels in [-1, 1], or scaled latents
    num_classes: int
    count: int | None             samples of one epoch; None: endless, sample i is made from its number
    identity: dict                what the data is, as JSON values; a checkpoint keeps it, and a run on other data
                                  is refused
    read(index, generator)        -> (x float32 (C, H, W), label int); chance, as a flip or the noise of a latent,
                                  comes from the torch.Generator alone. An item that is broken raises `Unreadable`.

`open_data` makes one of its name, and `ditfast.data.stream.stream` reads it, in an order that follows from a seed.
"""

from pathlib import Path


class DataError(Exception):
    """What the user has to change, in one line."""


class Unreadable(Exception):
    """An item of the data is broken. The text names its file."""


def open_data(name: str, image_size: int | None = None, **options):
    """The source of a name.

    Args:
        name: "digits" (8 x 8, grey), "glyphs" (characters, grey), or a folder: of images (`folder.Images`), or of
            latents that `python -m ditfast.encode` wrote (`latents.Latents`).
        image_size: height and width in pixels; what the source has by itself unless given.
        options: of the source: flip for a folder, and channels for one of images.

    Raises:
        DataError: no such data, or a size or option that it does not have.
        ImportError: a package that it needs is not installed.
    """
    from ditfast.data.digits import Digits
    from ditfast.data.folder import Images
    from ditfast.data.glyphs import Glyphs
    from ditfast.data.latents import Latents
    from ditfast.data.shards import INDEX, STARTED

    name = str(name)
    if image_size is not None:
        options["image_size"] = image_size
    made = {"digits": Digits, "glyphs": Glyphs}
    if name in made:
        return _make(made[name], options, name)
    if any(Path(name, file).is_file() for file in (INDEX, STARTED)):
        return _make(Latents, options, f"a folder of latents, {name},", folder=name)
    if Path(name).is_dir():
        return _make(Images, options, f"a folder of images, {name},", folder=name)
    raise DataError(
        f"data must be {', '.join(made)} or a folder of images or latents{_nearest(name, made)}, got {name!r}"
    )


def _make(kind, options, name, **given):
    """The source, unless it does not take an option."""
    from inspect import signature

    takes = signature(kind).parameters.keys() - given
    unknown = options.keys() - takes
    if unknown:
        has = f"takes {' and '.join(sorted(takes))}" if takes else "takes no options"
        raise DataError(f"{name} {has}, got {', '.join(sorted(unknown))}")
    return kind(**given, **options)


def _nearest(name, names):
    from difflib import get_close_matches

    near = get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
