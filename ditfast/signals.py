"""Signals that end a run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # batch systems send the last three
ENDING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


@contextmanager
def on_ending_signal(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Call ``handler(number, frame)`` on every signal that ends a run.

    An ignored signal, such as SIGHUP under nohup, stays ignored. SIGINT is the exception: shells ignore it for
    background jobs. Outside the main thread, which alone can have handlers, this does nothing.
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


def interrupt(number: int, frame: FrameType | None = None) -> NoReturn:
    """Handler that raises a KeyboardInterrupt for any signal."""
    raise KeyboardInterrupt(number)


def exit_status(error: KeyboardInterrupt) -> int:
    """The exit status that shells give to a process ended by the signal, 130 for Ctrl-C."""
    return 128 + (error.args[0] if error.args else signal.SIGINT)
