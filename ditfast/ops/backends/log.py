"""What ran on which backend."""

from contextlib import contextmanager

import torch

from ditfast.ops.backends.per_thread import PerThread, in_force, setting

_log = PerThread("log")  # dict[str, list[str]], or None: nobody wants to know


@contextmanager
def record():
    """Collect what this thread runs, and later its backward: yields a dict, operation -> list of backends."""
    with record_in({}) as log:
        yield log


def record_in(log: dict[str, list[str]]):
    """Inside the ``with`` block, add what runs to ``log``."""
    return setting(_log, log)


def current_log() -> dict[str, list[str]] | None:
    """Where `record` collects now."""
    return in_force(_log)


def note(op: str, name: str) -> None:
    """Tell `record` that ``op`` ran on ``name``."""
    # in this order: a compiled function must not depend on the log
    if torch.compiler.is_compiling():
        return
    log = current_log()
    if log is not None:
        log.setdefault(op, []).append(name)
