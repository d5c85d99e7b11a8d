"""Values that a thread sets for itself and for the backward passes that it calls.

Backward runs on a GPU in a thread of autograd's own. PyTorch gives such a thread what the thread that called backward
has stored with it, which `in_force` reads there; a thread that is started otherwise begins with the default.
"""

import threading
from contextlib import contextmanager

import torch


class PerThread(threading.local):
    """One value per thread; torch.compile guards on `own`, which it could not with a ContextVar."""

    def __init__(self, name: str, default=None):
        self.key, self.default = f"ditfast.{name}", default
        self.own = default


def in_force(value: PerThread):
    """What this thread has set, or the thread for which it runs backward."""
    if torch.compiler.is_compiling() or value.own is not value.default or not torch._C._is_key_in_tls(value.key):
        return value.own
    return torch._C._get_obj_in_tls(value.key)


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
    if not torch.compiler.is_compiling():
        torch._C._stash_obj_in_tls(value.key, handed_on)
