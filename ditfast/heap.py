"""What a step on a CPU frees, kept for the next one."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_TUNED_BY = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have malloc keep what a step frees, for the next step: one call per process, before training on a CPU.

    By itself glibc's malloc returns it to the system, which clears each page of 4 KiB anew when the next step touches
    it. From this call on, the process holds the most memory that it needed at once.

    Nothing changes with another C library, or where the environment tunes malloc: ``GLIBC_TUNABLES``,
    ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, even if empty.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _TUNED_BY):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, -1)  # never
    if not mallopt(_MMAP_THRESHOLD, 2**30):  # bytes of a block that gets pages of its own
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that glibc takes before 2.35
