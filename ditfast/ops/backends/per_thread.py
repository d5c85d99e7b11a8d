"""Values that a thread sets for itself and for the backward passes it calls.

On a GPU, backward runs in autograd's own thread. PyTorch hands that thread whatever the calling thread has stashed,
which `in_force` reads there; any other new thread starts with the default.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_kept: list = []  # objects stashed with PyTorch, twice: 2.11 drops a reference that it did not take


class _HandedOn:
    """Holds a thread's value for backward's threads to read."""

    def __init__(self):
        self.value = None
        _kept.extend((self, self))


class PerThread(threading.local):
    """One value per thread; torch.compile can guard on `own`, unlike on a ContextVar."""

    def __init__(self, name: str, default: Any = None):
        self.key, self.default = f"{__name__}.{name}", default
        self.own = default
        self.handed_on: _HandedOn | None = None  # created on first use


def in_force(value: PerThread) -> Any:
    """The value set by this thread, or by the thread for which it runs backward."""
    if torch.compiler.is_compiling() or value.own is not value.default or not torch._C._is_key_in_tls(value.key):
        return value.own
    return torch._C._get_obj_in_tls(value.key).value


@contextmanager
def setting(value: PerThread, new: Any) -> Iterator[Any]:
    """Set ``new`` for this thread inside the ``with`` block."""
    own, outer = value.own, in_force(value)
    _set(value, new, new)
    try:
        yield new
    finally:
        _set(value, own, outer)


def _set(value, own, handed_on):
    value.own = own
    if torch.compiler.is_compiling():
        return
    if value.handed_on is None:
        value.handed_on = _HandedOn()
        torch._C._stash_obj_in_tls(value.key, value.handed_on)
    value.handed_on.value = handed_on
