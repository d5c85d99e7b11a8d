"""The processes of a run: one, or as many as torchrun starts."""

import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from ditfast.orphans import end_with_torchrun

MEET = "DITFAST_RENDEZVOUS_SECONDS"  # variable: how long ranks wait for each other at the start
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (reset|closed|refused)|Broken pipe")  # how a rank's end shows on others


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Touches hosts alone, no device."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value) -> list:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, on the device."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def joined_ranks(timeout: timedelta = timedelta(days=7), nccl: bool = False):
    """The ranks that torchrun's environment describes, each on the GPU of its LOCAL_RANK.

    After an error the caller has to `exit_rank`.

    Args:
        timeout: longer than any rank may be behind another; one may sample or encode for hours more.
        nccl: tensors on GPUs are summed too; without it ranks only talk through their hosts.

    Raises:
        ConnectionError: another rank has not come in time, or has ended while this one waited for it; or the
            environment is not one that torchrun makes.
    """
    rank, world, device = _place()
    end_with_torchrun()
    ranks = Ranks(rank, world, device)
    try:
        if world > 1 or {"RANK", "MASTER_ADDR"} <= os.environ.keys():  # FSDP2 needs a group also of one process
            _check_environment()
            _meet("cpu:gloo,cuda:nccl" if nccl and device != "cpu" else "gloo", timeout)
            ranks.any(False)  # rank 0 holds the store: were it refused and gone now, others could not finish joining
        yield ranks
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"another rank has stopped or is out of reach, so rank {rank} of {world} ends: {reason}"
        ) from error
    else:
        if _is_joined():
            dist.barrier()
            # gloo's threads drop Python objects now: its destructor would wait for them and keep the GIL
            time.sleep(0.1)
            dist.destroy_process_group()


def exit_rank(message: str, code: int = 1):
    """End the process with an error. Among ranks nothing is torn down: that would wait for those that do not come."""
    if code == 1 and not _is_joined():
        sys.exit(message)
    with suppress(OSError):  # nobody may read it
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    if not _is_joined():
        sys.exit(code)
    os._exit(code)


def _is_joined():
    return dist.is_available() and dist.is_initialized()


def _place() -> tuple[int, int, str]:
    """This process's rank, how many there are, and its device."""
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
    """How many processes the environment tells of."""
    return _number("WORLD_SIZE", 1, least=1)


def _number(name, default, least=0):
    """A whole number in the environment, where an empty text is none.

    Raises:
        ConnectionError: it is no whole number, or too small.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > 9:
        raise ConnectionError(f"{name} must be a whole number, got {text!r} in the environment")
    if int(text) < least:
        raise ConnectionError(f"{name} must be at least {least}, got {text} in the environment")
    return int(text)


def _check_environment():
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if not os.environ.get(name)]:
        found = ", ".join(f"{name}={os.environ[name]}" for name in names if name not in missing)
        raise ConnectionError(
            f"{found} in the environment, but not {', '.join(missing)}: start all ranks with torchrun, "
            "or unset them for one process"
        )


def _meet(backend, timeout):
    """Join the other ranks, also where torchrun has started all of them again.

    torchrun's store may outlive a restart (TORCHELASTIC_USE_AGENT_STORE), and with it the addresses of the ranks that
    were before. On one machine the count of restarts tells them apart; on several each counts its own.
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
                "restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun", stacklevel=2
            )
        _wait_for_all(store, world, wait)
    except RuntimeError as error:  # the store's own kinds of it
        rank, world, *at = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"rank {rank} of {world} has not met the others at {':'.join(map(str, at))} in {wait.total_seconds():g} "
            f"seconds ({MEET} is another time): {str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _wait_for_all(store, world, wait):
    """Until each rank has said that it is here: joining would wait for one that is missing as long as for work."""
    if store.add("ditfast/here", 1) >= world:
        store.set("ditfast/all", "here")
    store.wait(["ditfast/all"], wait)
