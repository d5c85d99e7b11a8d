"""Self-check results and timings, cached on disk per GPU, driver, torch, triton and source code.

Each such environment has one file in ``$DITFAST_CACHE_DIR``, else ``$XDG_CACHE_HOME/ditfast``, else
``~/.cache/ditfast``. An answer is a line of JSON appended to it, so several processes may write at once; later lines
override earlier ones. Unreadable or unwritable files and lines are ignored.
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
    """The cache directory, which need not exist."""
    base = os.environ.get("DITFAST_CACHE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "ditfast"


@cache
def environment(device: torch.device) -> str:
    """The file's name: a hash of everything that could make a correct kernel wrong."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    machine = f"cpu {_isa()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)} {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    interpreter = os.environ.get("TRITON_INTERPRET", "0")
    digest.update(f"{machine} {torch.__version__} {interpreter}".encode())
    return f"selfcheck-{digest.hexdigest()[:24]}.jsonl"


def _sources() -> list[Path]:
    """The kernels, the extension, the code that launches and checks them, and a file that identifies Triton."""
    from ditfast import kernels

    found = find_spec(EXTENSION), find_spec("triton")  # importing Triton would take a quarter of a second
    others = [Path(spec.origin) for spec in found if spec and spec.origin]
    return [
        *sorted(Path(kernels.__path__[0]).glob("*.py")),
        *sorted(Path(__file__).parents[1].rglob("*.py")),
        *others,
    ]


def _isa() -> str:
    """The instruction set whose CPU kernels are in use."""
    try:
        return load_extension().isa()
    except ImportError:
        return "none"


def load(device: torch.device) -> dict[str, bool | dict]:
    """All answers on disk; empty if there are none."""
    answers = {}
    try:
        path = folder() / environment(device)
        lines = path.read_bytes().splitlines() if path.is_file() else ()
    except (OSError, RuntimeError):  # RuntimeError: no home directory
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
    """Append one answer to the file, if it can be written."""
    # starts with a newline, so that a line truncated by a full disk does not spoil this one
    line = f"\n{json.dumps([key, answer])}\n".encode()
    try:
        folder().mkdir(parents=True, exist_ok=True)
        file = os.open(folder() / environment(device), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except (OSError, RuntimeError):
        return
    try:
        os.write(file, line)  # a single write: lines of several processes do not mix
    except OSError:
        pass
    finally:
        os.close(file)
