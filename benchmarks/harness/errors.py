"""Exceptions in results, and what to do when no more can be computed in a process."""

import os
import sys

LOST = 86  # exit status of a process whose GPU no longer answers; pytest's own end at 5


def error_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def gpu_is_lost() -> bool:
    """Whether an error such as an illegal access ended this process's use of the GPU: all later calls would fail."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def leave_if_gpu_is_lost() -> None:
    """End the process if nothing more can be measured in it; call it after results are written."""
    if gpu_is_lost():
        os._exit(LOST)
