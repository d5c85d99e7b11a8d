"""Ranks that outlive a killed torchrun."""

import os
import signal
import time
from threading import Thread

OFTEN = 0.5  # seconds between checks
GRACE = 120.0  # seconds for a rank to write its checkpoint


def end_with_torchrun() -> None:
    """Once torchrun, the parent process, is gone, send this process SIGTERM, and SIGKILL after `GRACE` seconds."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent):
    while os.getppid() == parent:
        time.sleep(OFTEN)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
