"""Files that exist either complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def part_path(path: Path) -> Path:
    """Temporary path of a file or folder until it is complete."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_write(path: Path, concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success rename it to ``path``, on failure remove it.

    Args:
        concurrent: several processes may write the same file at once; the last one wins.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    part = part_path(path.with_name(f"{path.name}.{os.getpid()}") if concurrent else path)
    try:
        yield part
        os.replace(part, path)
    finally:
        with suppress(OSError):  # its parent may not be a folder
            part.unlink(missing_ok=True)
