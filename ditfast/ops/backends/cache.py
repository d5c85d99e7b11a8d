"""Answers of the self-check, and times, kept on disk for this GPU, driver, torch, triton and source code.

One file per such environment, in ``$DITFAST_CACHE_DIR``, else ``$XDG_CACHE_HOME/ditfast``, else ``~/.cache/ditfast``.
Each answer is a line of JSON at its end, so that several processes may write at once, and a later answer takes the
place of an earlier one. A file or line that cannot be read or written is as good as none.
"""

import hashlib
import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ditfast.load_extension import NAME as EXTENSION
from ditfast.load_extension import load_extension


def folder() -> Path:
    base = os.environ.get("DITFAST_CACHE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ditfast"


@cache
def environment(device: torch.device) -> str:
    """Name of the file: whatever could make a right kernel wrong is in it."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    machine = f"cpu {_isa()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)} {torch._C._cuda_getDriverVersion()}"
    interpreter = os.environ.get("TRITON_INTERPRET", "0")
    digest.update(f"{machine} {torch.__version__} {interpreter}".encode())
    return f"selfcheck-{digest.hexdigest()[:24]}.jsonl"


def _sources() -> list[Path]:
    """The kernels, the extension, what launches and checks them, and the file that says which Triton it is."""
    from ditfast import kernels

    found = find_spec(EXTENSION), find_spec("triton")  # the import of Triton would take a quarter of a second
    others = [Path(spec.origin) for spec in found if spec and spec.origin]
    return [
        *sorted(Path(kernels.__path__[0]).glob("*.py")),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
        *others,
    ]


def _isa() -> str:
    """Whose CPU kernels the answers are about."""
    try:
        return load_extension().isa()
    except ImportError:
        return "none"


def load(device: torch.device) -> dict[str, bool | dict]:
    """All answers on disk; empty where there are none."""
    answers = {}
    try:
        path = folder() / environment(device)
        lines = path.read_bytes().splitlines() if path.is_file() else ()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return {}
    for line in lines:
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(key, str) and isinstance(answer, bool | dict):
            answers[key] = answer
    return answers


def store(device: torch.device, key: str, answer: bool | dict) -> None:
    """Add one answer to those on disk, if the disk lets us."""
    # it begins a line: what a full disk has cut off does not spoil it
    line = f"\n{json.dumps([key, answer])}\n".encode()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        file = os.open(folder() / environment(device), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except (OSError, RuntimeError):
        return
    try:
        os.write(file, line)  # in one piece, between those of other processes
    except OSError:
        pass
    finally:
        os.close(file)
