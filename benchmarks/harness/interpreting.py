"""Triton's interpreter, where there is no GPU. It counts only if it is chosen before kernels are defined."""

import os
from importlib.util import find_spec


def choose_interpreter() -> None:
    """Let Triton interpret the kernels that are defined from now on."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        _accept_new_numpy()


def _accept_new_numpy():
    """Triton's interpreter before 3.7 makes an int of an array with one element, which numpy refuses since 2.4."""
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_item(tensor, *rest):
        patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_with_item
