"""Records which backend each operation ran on."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ditfast.ops.backends.per_thread import PerThread, in_force, setting

_log = PerThread("log")  # dict[str, list[str]], or None if nothing is recorded
_was_wanted = False  # whether any thread has ever recorded; most processes never do


@contextmanager
def record() -> Iterator[dict[str, list[str]]]:
    """Record what this thread runs, and later its backward: yields {operation: [backend, …]}."""
    with record_in({}) as log:
        yield log


def record_in(log: dict[str, list[str]]) -> AbstractContextManager[dict[str, list[str]]]:
    """Add what runs inside the ``with`` block to ``log``."""
    global _was_wanted
    _was_wanted = True
    return setting(_log, log)


def current_log() -> dict[str, list[str]] | None:
    """The dict that `record` currently fills, if any."""
    return in_force(_log) if _was_wanted else None


def note(op: str, name: str) -> None:
    """Tell `record` that ``op`` ran on ``name``."""
    # checked first: a compiled function must not depend on the log
    if torch.compiler.is_compiling():
        return
    log = current_log()
    if log is not None:
        log.setdefault(op, []).append(name)
