"""What a call takes from the machine besides its time: memory."""

from pathlib import Path

from harness.block.memory import peak_bytes as peak_on_gpu

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(run, device: str) -> int | None:
    """The most memory that ``run()`` takes beyond what is there before; None where a CPU's cannot be told."""
    if device == "cuda":
        return peak_on_gpu(run, device)
    try:
        _RESET.write_text("5")  # the peak becomes what is resident now
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before
    except OSError:  # not Linux, or not allowed
        return None


def _resident(name):
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
