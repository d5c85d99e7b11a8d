"""Ranks whose torchrun was killed, and can end them no more."""

import os
import signal
import time
from threading import Thread

OFTEN = 0.5  # seconds between two looks
GRACE = 120.0  # seconds that a rank has for its checkpoint


def end_with_torchrun() -> None:
    """Send this process SIGTERM when the one that started it, torchrun, is gone; in the end SIGKILL."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent):
    while os.getppid() == parent:
        time.sleep(OFTEN)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
