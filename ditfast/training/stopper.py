"""Stopping a run from outside."""

import signal

from ditfast.signals import on_ending_signal


class Stopper:
    """While it is entered, signals that end a run only set ``requested``; a second SIGINT interrupts at once."""

    def __init__(self):
        self.requested = False
        self._handled = on_ending_signal(self._on_signal)

    def __enter__(self):
        self._handled.__enter__()
        return self

    def __exit__(self, *error):
        self._handled.__exit__(*error)

    def _on_signal(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
