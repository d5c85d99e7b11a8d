"""Files that are there whole or not at all."""

import os
from contextlib import contextmanager, suppress
from pathlib import Path


def part_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_write(path: Path, concurrent: bool = False):
    """A path to write to that becomes ``path`` in one step, or is removed if that fails.

    Args:
        concurrent: several processes may write the same file at once; the last one wins.

    Raises:
        OSError: the system refuses, as a full disk does.
    """
    part = part_path(path.with_name(f"{path.name}.{os.getpid()}") if concurrent else path)
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):  # where its folder is none
            part.unlink(missing_ok=True)
