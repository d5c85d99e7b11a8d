"""Loading the extension ``ditfast._C``. What stands in the way of it is an ImportError, whatever it is."""

import struct
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec

NAME = f"{__package__}._C"


def load_extension():
    """The module ``ditfast._C``.

    Raises:
        ImportError: it is not installed (ModuleNotFoundError), or cannot be loaded: a file that is cut short, built
            for another Python, for a newer C library, or for other CPUs.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        return loaded
    spec = find_spec(NAME)
    reason = None if spec is None else why_cut_short(spec.origin)
    if reason is not None:
        raise ImportError(reason)  # loading such a file would end the process (SIGBUS)
    return import_module(NAME)


@cache
def why_cut_short(path: str) -> str | None:
    """Why a shared library lacks its end, as after an interrupted copy; None if it does not, or is no 64-bit ELF."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
        if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian
            return None
        if size < 64:
            return f"{path} is cut short: {size} bytes"
        (table,), (entry, count) = struct.unpack_from("<Q", header, 32), struct.unpack_from("<HH", header, 54)
        file.seek(table)
        segments = file.read(entry * count)
    needed = table + entry * count
    for at in range(0, len(segments) - entry + 1, entry):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", segments, at)
        if kind == 1:  # to be mapped into memory
            needed = max(needed, offset + length)
    return f"{path} is cut short: {size} of {needed} bytes or more" if size < needed else None
