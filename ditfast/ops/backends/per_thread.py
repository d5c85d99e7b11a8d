"""Values that a thread sets for itself and for the backward passes that it calls.

Backward runs on a GPU in a thread of autograd's own. PyTorch gives such a thread what the thread that called backward
has stored with it, which `in_force` reads there; a thread that is started otherwise begins with the default.
"""

import threading
from contextlib import contextmanager

import torch

_kept = []  # what is stored with PyTorch, twice: 2.11 takes away a reference that it did not add


class _HandedOn:
    """Where a thread keeps a value for backward's threads to read."""

    def __init__(self):
        self.value = None
        _kept.extend((self, self))


class PerThread(threading.local):
    """One value per thread; torch.compile guards on `own`, which it could not with a ContextVar."""

    def __init__(self, name: str, default=None):
        self.key, self.default = f"{__name__}.{name}", default
        self.own = default
        self.handed_on = None  # made when first set


def in_force(value: PerThread):
    """What this thread has set, or the thread for which it runs backward."""
    if torch.compiler.is_compiling() or value.own is not value.default or not torch._C._is_key_in_tls(value.key):
        return value.own
    return torch._C._get_obj_in_tls(value.key).value


@contextmanager
def setting(value: PerThread, new):
    """``new`` in this thread, inside the ``with`` block."""
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
