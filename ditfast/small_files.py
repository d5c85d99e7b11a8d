"""Text and JSON from small files, whatever they hold."""

import json
import os
import stat
from pathlib import Path

LARGEST = 1 << 26  # bytes; the index of latents of ImageNet takes less than one


def read_text(path) -> str:
    """All of a small text file.

    Raises:
        OSError: it cannot be read, is no regular file, which may never end, or is larger than `LARGEST`.
        ValueError: it is no UTF-8.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if found.st_size > LARGEST:
        raise OSError(f"{path} has {found.st_size} bytes, more than {LARGEST}")
    return Path(path).read_text(encoding="utf-8")


def read_object(path) -> dict:
    """The JSON object in a small file.

    Raises:
        OSError: see `read_text`.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} must hold a JSON object, got one that is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
