"""Questions about a kernel are answered apart from the call that raised them."""

from concurrent.futures import ThreadPoolExecutor

import torch


def run_apart(device: torch.device, function, *args):
    """``function(*args)`` where nothing of the caller's thread is in force.

    Autocast, gradient modes, saved-tensor hooks (those of activation checkpointing), dispatch modes, the current
    stream, `record` and `use_backend` are a thread's own; so this is another thread, in which kernels are launched on
    ``device``.
    """

    def run():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
