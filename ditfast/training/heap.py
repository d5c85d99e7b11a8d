"""What a step frees on a CPU, kept for the next one."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_TUNED_BY = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Have malloc keep, in this process, what a step frees: the next one needs it again.

    By itself glibc hands it back, and the system clears each page of 4 KiB anew. From then on the process holds the
    most that it ever needed at once. Another C library, and one that the environment tunes, stays as it is.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _TUNED_BY):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, -1)  # never
    if not mallopt(_MMAP_THRESHOLD, 2**30):  # bytes of a block that gets pages of its own
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that glibc takes before 2.35
