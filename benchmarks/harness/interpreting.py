"""Triton's interpreter, for machines without a GPU; it must be chosen before kernels are defined."""

import os
from importlib.util import find_spec


def choose_interpreter() -> None:
    """Make Triton interpret all kernels defined from now on."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        _accept_new_numpy()


def _accept_new_numpy():
    """Before 3.7, Triton's interpreter converts one-element arrays to int, which numpy >= 2.4 rejects."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_item(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_with_item
