"""Stop a run by signal."""

import os
import signal
from contextlib import suppress
from types import FrameType

from ditfast.signals import interrupt, on_ending_signal

STDERR = 2  # written to directly: Python's stream may be in the middle of a write


class Stopped(Exception):
    """The run was stopped by the signal ``number``, and has written a checkpoint."""

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.number = number


class Stopper:
    """Context in which signals that end a run only set ``requested``; a second SIGINT interrupts immediately.

    Args:
        speaks: print a line when the first signal arrives.

    Attributes:
        requested: number of the first signal; None before.
    """

    def __init__(self, speaks: bool) -> None:
        self.requested: int | None = None
        self._speaks = speaks
        self._handled = on_ending_signal(self._on_signal)

    def __enter__(self) -> "Stopper":
        self._handled.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handled.__exit__(*error)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                interrupt(number)
            return
        self.requested = number
        if self._speaks:
            again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
            with suppress(OSError):  # the reading end may be closed
                os.write(STDERR, f"\nstopping after this step{again}\n".encode())
