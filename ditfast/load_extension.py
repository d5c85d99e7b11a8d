"""Load the extension ``ditfast._C``; every failure is an ImportError."""

import struct
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

NAME = f"{__package__}._C"


def load_extension() -> Any:
    """Return the module ``ditfast._C``.

    Raises:
        ImportError: it is not installed (ModuleNotFoundError) or cannot be loaded: the file is truncated, or was
            built for another Python, a newer C library or other CPUs.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return loaded
    spec = find_spec(NAME)
    reason = None if spec is None or spec.origin is None else why_cut_short(spec.origin)
    if reason is not None:
        raise ImportError(reason)  # loading such a file would end the process (SIGBUS)
    return import_module(NAME)


@cache
def why_cut_short(path: str) -> str | None:
    """Say if a shared library is truncated, as after an interrupted copy; None if not, or if not a 64-bit ELF."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
        if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
            return None
        if size < 64:
            return f"{path} is truncated: {size} bytes"
        (table,), (entry, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry * count)
    needed = table + entry * count
    for at in range(0, len(segments) - entry + 1, entry):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", segments, at)
        if kind == 1:  # PT_LOAD: mapped into memory
            needed = max(needed, offset + length)
    return f"{path} is truncated: {size} of {needed} bytes or more" if size < needed else None
