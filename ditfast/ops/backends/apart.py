"""Run checks of a kernel in isolation from the call that triggered them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def run_apart(device: torch.device, function: Callable, *args: object) -> Any:
    """Run ``function(*args)`` in a fresh thread, with ``device`` as its current device.

    Autocast, gradient modes, saved-tensor hooks (e.g. of activation checkpointing), dispatch modes, the current
    stream, `record` and `use_backend` are all per thread, so the caller's do not apply.
    """

    def run():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
