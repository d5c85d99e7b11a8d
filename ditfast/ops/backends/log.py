"""What ran on which backend."""

from contextlib import contextmanager

import torch

from ditfast.ops.backends.per_thread import PerThread, in_force, setting

_log = PerThread("log")  # dict[str, list[str]], or None: nobody wants to know


@contextmanager
def record():
    """Collect what this thread runs: yields a dict, operation -> list of backends, forward and backward."""
    with setting(_log, {}) as log:
        yield log


def note(op: str, name: str) -> None:
    """Tell `record` that ``op`` ran on ``name``."""
    # in this order: a compiled function must not depend on the log
    if torch.compiler.is_compiling():
        return
    log = in_force(_log)
    if log is not None:
        log.setdefault(op, []).append(name)
