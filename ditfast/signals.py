"""The signals that tell a run to end."""

import signal
import threading
from contextlib import contextmanager

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # the last three are sent by batch systems
ENDING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


@contextmanager
def on_ending_signal(handler):
    """Call ``handler(number, frame)`` for each of the signals that tell a run to end.

    A signal that is ignored, as SIGHUP is under nohup, stays so. SIGINT does not: shells ignore it for all that they
    start in the background. Only the main thread can have handlers; in others nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING}
    taken = {
        number: found
        for number, found in before.items()
        if found is not None and (found != signal.SIG_IGN or number == signal.SIGINT)
    }
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in taken.items():
            signal.signal(number, found)
