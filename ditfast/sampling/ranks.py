"""The processes of a run: one, or as many as torchrun starts."""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def place() -> tuple[int, int, str]:
    """This process's rank, how many there are, and its device: what torchrun's environment describes."""
    defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(name, default)) for name, default in defaults)
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(local)  # Triton launches on the current device
    return rank, world, device


@contextmanager
def joined():
    """The ranks of a run that only wait for each other."""
    rank, world, device = place()
    if world > 1:
        # ranks only wait for each other, and a slow one may be hours behind
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
