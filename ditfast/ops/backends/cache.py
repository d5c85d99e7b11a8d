"""Answers of the self-check, and times, kept on disk for this GPU, driver, torch, triton and source code.

One JSON file per such environment, in ``$DITFAST_CACHE_DIR``, else ``$XDG_CACHE_HOME/ditfast``, else
``~/.cache/ditfast``. Several processes may write: each replaces the file as a whole. A file that cannot be read or
written is as good as none.
"""

import contextlib
import hashlib
import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from ditfast.atomic import atomic_write


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
    machine = "cpu"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)} {torch._C._cuda_getDriverVersion()}"
    interpreter = os.environ.get("TRITON_INTERPRET", "0")
    digest.update(f"{machine} {torch.__version__} {_triton_version()} {interpreter}".encode())
    return f"selfcheck-{digest.hexdigest()[:24]}.json"


def _sources() -> list[Path]:
    """The kernels, the extension, and what launches and checks them."""
    from ditfast import kernels

    extension = find_spec("ditfast._C")
    binary = [Path(extension.origin)] if extension else []
    return [
        *sorted(Path(kernels.__path__[0]).glob("*.py")),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
        *binary,
    ]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def load(device: torch.device) -> dict[str, bool | dict]:
    """All answers on disk; empty where there are none or the file is damaged."""
    try:
        answers = json.loads((folder() / environment(device)).read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in answers.items() if isinstance(v, bool | dict)} if isinstance(answers, dict) else {}


def store(device: torch.device, key: str, answer: bool | dict) -> None:
    """Add one answer to those on disk, if the disk lets us."""
    with contextlib.suppress(OSError):
        folder().mkdir(parents=True, exist_ok=True)
        answers = load(device) | {key: answer}
        with atomic_write(folder() / environment(device), concurrent=True) as part:
            part.write_text(json.dumps(answers, indent=0, sort_keys=True))
