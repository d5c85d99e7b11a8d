"""checkpoint.json: what a checkpoint is of, which files it has, and checksums of them and of itself."""

import json
import os
import re
import zlib
from pathlib import Path

from ditfast.training.tensor_index import INDEX, PARTS, read_index

ABOUT = "checkpoint.json"
LARGEST = 1 << 26  # bytes
KINDS = {"step": int, "samples": int, "nonfinite": int, "unreadable": int, "files": dict, "model": dict, "data": dict}
# of files that have no "checksum" yet
OLD = {*KINDS, "vae", "noise_schedule", "seed", "backends", "ema_warmup", "sampling", "config"}


def write_about(folder: Path, content: dict) -> None:
    """Write checkpoint.json to the disk, with its checksum."""
    content = json.loads(json.dumps(content))
    with open(folder / ABOUT, "w", encoding="utf-8") as file:
        json.dump({**content, "checksum": _sum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_about(folder: Path) -> dict:
    """What checkpoint.json says.

    Raises:
        OSError: there is none.
        ValueError: it is not what was written.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise FileNotFoundError(path)
    if path.stat().st_size > LARGEST:
        raise ValueError("too large")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(content, dict):
        raise ValueError("no object")
    found = content.pop("checksum", None)
    if found != _sum(content) and (found is not None or content.keys() - OLD):
        raise ValueError("another checksum")
    for name, kind in KINDS.items():
        if type(content.get(name)) is not kind:
            raise ValueError(f"{name} is not of type {kind.__name__}")
    if not _are_files(content["files"]):
        raise ValueError("files are not those of a checkpoint")
    return content


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole: a file is missing, or is not what was written."""
    try:
        about = read_about(folder)
    except OSError:
        return f"no {ABOUT} in it"
    except ValueError as error:
        return f"{ABOUT} is broken: {error}"
    if re.fullmatch(r"step-\d+", folder.name) and int(folder.name[5:]) != about["step"]:
        return f"{ABOUT} is of step {about['step']}"
    for name, sums in about["files"].items():
        try:
            whole = (folder / name).stat().st_size == sums[0] and checksum(folder / name) == sums
        except OSError:
            return f"{name} is missing"
        if not whole:
            return f"{name} is not what was written"
    try:
        read_index(folder)
    except ValueError as error:
        return str(error)
    return None


def checksum(path: Path) -> list:
    """Size and CRC-32 of a file.

    Raises:
        OSError: there is none, or it is a device, which might never end.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    total, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, f"{total:08x}"]


def _are_files(files):
    """Whether these are names inside the folder with a checksum each, the index of the tensors among them."""
    names = all(name == INDEX or re.fullmatch(PARTS, name) for name in files)
    sums = all(isinstance(each, list) and [*map(type, each)] == [int, str] for each in files.values())
    return names and sums and INDEX in files and len(files) > 1


def _sum(content):
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
