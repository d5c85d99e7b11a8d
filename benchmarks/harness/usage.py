"""Memory usage of a call."""

import ctypes
import gc
import sys
from pathlib import Path

from harness.block.memory import peak_bytes as peak_on_gpu

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(run, device: str) -> int | None:
    """Peak memory of ``run()`` in bytes, relative to the start; None if unknown, which happens on CPUs."""
    if device == "cuda":
        return peak_on_gpu(run, device)
    try:
        _give_back()
        _RESET.write_text("5")  # resets the peak to the current resident size
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError:  # not Linux, or no permission
        return None


def _give_back():
    """Return malloc's free memory to the system: a run that reuses it would not raise the peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:  # glibc's
        trim(0)


def _resident(name):
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
