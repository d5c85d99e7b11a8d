"""Questions about a kernel are answered apart from the call that raised them."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ditfast.ops.backends import log


def run_apart(device: torch.device, function, *args):
    """``function(*args)`` where nothing of the caller's thread is in force.

    Autocast, gradient modes, saved-tensor hooks (those of activation checkpointing), dispatch modes and the current
    stream are a thread's own; so this is another thread, in which kernels are launched on ``device``.
    """

    def run():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with log.pause():
            return function(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
