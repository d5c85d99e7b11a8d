"""The processes of a run: one, or as many as torchrun starts."""

import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ditfast.orphans import end_with_torchrun

MEET = "DITFAST_RENDEZVOUS_SECONDS"  # environment variable: how long ranks wait for each other at startup
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (reset|closed|refused)|Broken pipe")  # errors seen when a peer has died


class Ranks(NamedTuple):
    """This process among the processes of a run, and the collectives between them."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Block until all ranks get here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. CPU only: does not synchronize with a device."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (any picklable object), by rank, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks in place, on its device."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def joined_ranks(timeout: timedelta = timedelta(days=7), nccl: bool = False) -> Iterator[Ranks]:
    """Join the ranks described by torchrun's environment, each on the GPU of its LOCAL_RANK.

    After an error the caller must call `exit_rank`.

    Args:
        timeout: upper bound on how far ranks drift apart; one may sample or encode for hours longer than another.
        nccl: also sum tensors on GPUs; without it ranks communicate through the CPU only.

    Raises:
        ConnectionError: another rank did not join in time or died while this one waited for it, or the environment
            was not set up by torchrun.
    """
    rank, world, device = _place()
    end_with_torchrun()
    ranks = Ranks(rank, world, device)
    try:
        if world > 1 or {"RANK", "MASTER_ADDR"} <= os.environ.keys():  # FSDP2 needs a group even for one process
            _check_environment()
            _meet("cpu:gloo,cuda:nccl" if nccl and device != "cpu" else "gloo", timeout)
            ranks.any(False)  # rank 0 hosts the store: if it exited now, the others could not finish joining
        yield ranks
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"another rank has stopped or is unreachable, so rank {rank} of {world} exits: {reason}"
        ) from error
    else:
        if _is_joined():
            dist.barrier()
            # gloo's threads release Python objects now: its destructor would wait for them while holding the GIL
            time.sleep(0.1)
            dist.destroy_process_group()


def exit_rank(message: str, code: int = 1) -> NoReturn:
    """Exit with an error message. A rank of many skips teardown, which would wait for ranks that are gone."""
    if code == 1 and not _is_joined():
        sys.exit(message)
    with suppress(OSError):  # the reading end may be closed
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    if not _is_joined():
        sys.exit(code)
    os._exit(code)


def _is_joined():
    return dist.is_available() and dist.is_initialized()


def _place() -> tuple[int, int, str]:
    """Returns (rank, number of ranks, device) of this process."""
    rank, world, local = _number("RANK", 0), world_size(), _number("LOCAL_RANK", 0)
    if rank >= world:
        raise ConnectionError(f"RANK must be below WORLD_SIZE={world}, got {rank} in the environment")
    device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        if local >= (there := torch.cuda.device_count()):
            raise ConnectionError(f"LOCAL_RANK must be below the number of GPUs, {there}, got {local}")
        torch.cuda.set_device(local)  # Triton launches on the current device
    return rank, world, device


def world_size() -> int:
    """Number of processes according to the environment."""
    return _number("WORLD_SIZE", 1, least=1)


def _number(name, default, least=0):
    """An integer from the environment; unset or empty means the default.

    Raises:
        ConnectionError: it is not an integer, or too small.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > 9:
        raise ConnectionError(f"{name} must be an integer, got {text!r} in the environment")
    if int(text) < least:
        raise ConnectionError(f"{name} must be at least {least}, got {text} in the environment")
    return int(text)


def _check_environment():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        found = ", ".join(f"{name}={os.environ[name]}" for name in names if name not in missing)
        raise ConnectionError(
            f"the environment has {found} but not {', '.join(missing)}: start all ranks with torchrun, "
            "or unset them to run a single process"
        )


def _meet(backend, timeout):
    """Join the other ranks, also after torchrun has restarted all of them.

    torchrun's store may survive a restart (TORCHELASTIC_USE_AGENT_STORE) and still hold the addresses of the previous
    ranks. On one machine the restart count tells them apart; across machines, each counts its own restarts.
    """
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "USE_AGENT_STORE"))
    wait = timedelta(seconds=_number(MEET, 120, least=1))
    try:
        store, rank, world = next(rendezvous("env://", timeout=wait))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"restart-{restarts}", store)
        elif shared == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and rank == 0:
            warnings.warn(
                "restarts across machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 set for torchrun", stacklevel=2
            )
        _wait_for_all(store, world, wait)
    except RuntimeError as error:  # base class of the store's errors
        rank, world, *at = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"rank {rank} of {world} did not reach the others at {':'.join(map(str, at))} within "
            f"{wait.total_seconds():g} seconds (set {MEET} to change this): {str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _wait_for_all(store, world, wait):
    """Block until every rank has checked in: joining would wait for a missing one with the timeout meant for work."""
    if store.add("ditfast/here", 1) >= world:
        store.set("ditfast/all", "here")
    store.wait(["ditfast/all"], wait)
