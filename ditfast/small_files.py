"""Read text and JSON from small, untrusted files."""

import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST = 1 << 26  # bytes; the index of ImageNet's latents takes less than 1 MiB


def read_text(path: str | Path) -> str:
    """Contents of a small text file.

    Raises:
        OSError: it cannot be read, is larger than `LARGEST`, or is not a regular file and may never end.
        ValueError: it is not UTF-8.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if found.st_size > LARGEST:
        raise OSError(f"{path} has {found.st_size} bytes, more than {LARGEST}")
    return Path(path).read_text(encoding="utf-8")


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        OSError: see `read_text`.
        ValueError: it is not a JSON object.
    """
    try:
        found = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} must hold a JSON object, got one nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found
