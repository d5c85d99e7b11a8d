"""Validation of the index of latents, `shards.INDEX`, which may have been edited or come from another program."""

import re
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ditfast.data.errors import DataError
from ditfast.data.shards import Shards

LARGE = 1e6  # more than any scale or shift of latents


def check_index(path: Path, about: dict[str, Any]) -> None:
    """Reject an index with a field value that encode never writes; missing fields are not checked here.

    Raises:
        DataError: naming the file, the field, the rule and the value.
    """
    rules = {
        "shape": (_is_shape, "three integers"),
        "classes": (lambda v: _is_list(v, str) and v, "names"),
        "count": (_is_count, "an integer"),
        "scale": (lambda v: _are_numbers(v, about["shape"][0]) and v != 0, "a number, or one per channel"),
        "shift": (lambda v: _are_numbers(v, about["shape"][0]), "a number, or one per channel"),
        "vae_sha256": (lambda v: isinstance(v, str | None), "a checksum"),
        "image_size": (lambda v: _is_count(v) and v > 0, "a positive integer"),
        "unreadable": (lambda v: _is_list(v, str), "names"),
        "shards": (lambda v: isinstance(v, list) and all(map(_is_shard, v)), "files with their counts"),
        "data": (lambda v: isinstance(v, dict), "a description of the images"),
    }
    for name, (fits, what) in rules.items():
        if name in about and not fits(about[name]):
            raise DataError(f"{path} is damaged: {name} must be {what}, got {short(about[name])}: encode again")
    held = sum(each["count"] for each in about["shards"])
    if not 0 < held == about["count"]:
        raise DataError(
            f"{path} is damaged: count must be {held}, the total of its shards, got {about['count']}: encode again"
        )


def _is_count(value):
    return type(value) is int and 0 <= value < 2**48


def _are_numbers(value, channels):
    values = value if isinstance(value, list) else [value] * channels
    return len(values) == channels and all(type(each) in (int, float) and abs(each) < LARGE for each in values)


def _is_shape(value):
    return _is_list(value, int) and len(value) == 3 and all(0 < each < 2**16 for each in value)


def _is_list(value, kind):
    return isinstance(value, list) and all(type(each) is kind for each in value)


def _is_shard(value):
    """Whether it names a file in the folder itself, with a name that encode uses."""
    named = (
        isinstance(value, dict) and isinstance(value.get("file"), str) and re.fullmatch(Shards.pattern, value["file"])
    )
    return named and _is_count(value.get("count"))
