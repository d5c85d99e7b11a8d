"""What ran on which backend."""

from contextlib import contextmanager

import torch

_log: dict[str, list[str]] | None = None


@contextmanager
def record():
    """Collect what runs: yields a dict, operation -> list of the backends it ran on, forward and backward."""
    global _log
    outer, _log = _log, {}
    try:
        yield _log
    finally:
        _log = outer


@contextmanager
def pause():
    """Collect nothing of what runs inside."""
    global _log
    outer, _log = _log, None
    try:
        yield
    finally:
        _log = outer


def note(op: str, name: str) -> None:
    """Tell `record` that ``op`` ran on ``name``."""
    # in this order: a compiled function must not depend on _log
    if not torch.compiler.is_compiling() and _log is not None:
        _log.setdefault(op, []).append(name)
