"""Stop a run by signal."""

import signal
from types import FrameType

from ditfast.signals import on_ending_signal


class Stopper:
    """Context in which signals that end a run only set ``requested``; a second SIGINT interrupts immediately."""

    def __init__(self) -> None:
        self.requested = False
        self._handled = on_ending_signal(self._on_signal)

    def __enter__(self) -> "Stopper":
        self._handled.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handled.__exit__(*error)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
