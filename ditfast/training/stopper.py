"""Stopping a run from outside."""

import signal


class Stopper:
    """While it is entered, SIGTERM and SIGINT only set ``told``; a second SIGINT interrupts at once."""

    def __init__(self):
        self.told = False

    def __enter__(self):
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.told = True
