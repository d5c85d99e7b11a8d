"""checkpoint.json: the run a checkpoint belongs to, its files, and checksums of them and of itself."""

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

from ditfast.training.tensor_index import INDEX, PARTS, read_index

ABOUT = "checkpoint.json"
LARGEST = 1 << 26  # bytes
KINDS = {"step": int, "samples": int, "nonfinite": int, "unreadable": int, "files": dict, "model": dict, "data": dict}
# fields of older files, which lack "checksum"
OLD = {*KINDS, "vae", "noise_schedule", "seed", "backends", "ema_warmup", "sampling", "config"}


def write_about(folder: Path, content: dict[str, Any]) -> None:
    """Write checkpoint.json with its checksum and flush it to disk."""
    content = json.loads(json.dumps(content))
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        json.dump({**content, "checksum": _sum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_about(folder: Path) -> dict[str, Any]:
    """Contents of checkpoint.json.

    Raises:
        OSError: it does not exist.
        ValueError: it is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.stat().st_size > LARGEST:
        raise ValueError("too large")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    found = content.pop("checksum", None)
    if found != _sum(content) and (found is not None or content.keys() - OLD):
        raise ValueError("checksum mismatch")
    for name, kind in KINDS.items():
        if type(content.get(name)) is not kind:
            raise ValueError(f"{name} is not of type {kind.__name__}")
    if not _are_files(content["files"]):
        raise ValueError("invalid list of files")
    return content


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, such as a missing or damaged file; None if it is intact."""
    try:
        about = read_about(folder)
    except OSError:
        return f"{ABOUT} is missing"
    except ValueError as error:
        return f"{ABOUT} is damaged: {error}"
    if re.fullmatch(r"step-\d+", folder.name) and int(folder.name[5:]) != about["step"]:
        return f"{ABOUT} belongs to step {about['step']}"
    for name, sums in about["files"].items():
        try:
            whole = (folder / name).stat().st_size == sums[0] and checksum(folder / name) == sums
        except OSError:
            return f"{name} is missing"
        if not whole:
            return f"{name} is damaged: size or checksum mismatch"
    try:
        read_index(folder)
    except ValueError as error:
        return str(error)
    return None


def checksum(path: Path) -> list[int | str]:
    """Size in bytes and CRC-32 of a file.

    Raises:
        OSError: it does not exist, or is not a regular file and might never end.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    total, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, f"{total:08x}"]


def _are_files(files):
    """Whether ``files`` maps names inside the folder, including the tensor index, to checksums."""
    names = all(name == INDEX or re.fullmatch(PARTS, name) for name in files)
    sums = all(isinstance(each, list) and [*map(type, each)] == [int, str] for each in files.values())
    return names and sums and INDEX in files and len(files) > 1


def _sum(content):
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
