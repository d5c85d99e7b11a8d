"""The processes of a run, and a model on all of them."""

import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ditfast.sampling.ranks import place
from ditfast.training import TrainError

LOST = re.compile(r"gloo|NCCL|[Cc]onnection (reset|closed|refused)|Broken pipe")  # how a rank's end shows on others
TIMEOUT = timedelta(minutes=30)  # longer than any rank may be behind: a checkpoint, a first compilation


class Ranks(NamedTuple):
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Touches hosts alone, no device."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag))
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
def joined():
    """The ranks that torchrun's environment describes, each on the GPU of its LOCAL_RANK.

    After an error the caller has to `leave`.
    """
    rank, world, device = place()
    if "RANK" in os.environ:  # also a single process of torchrun, which FSDP2 needs
        _meet("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Ranks(rank, world, device)
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"another rank has stopped or is out of reach, so rank {rank} of {world} ends: {reason}"
        ) from error
    else:
        if dist.is_initialized():
            dist.barrier()
            # gloo's threads drop Python objects now: its destructor would wait for them and keep the GIL
            time.sleep(0.1)
            dist.destroy_process_group()


def leave(message: str):
    """End the process with an error. Among ranks nothing is torn down: that would wait for those that do not come."""
    if not dist.is_initialized():
        sys.exit(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _meet(backend):
    """Join the other ranks, also where torchrun has started all of them again.

    torchrun's store may outlive a restart (TORCHELASTIC_USE_AGENT_STORE), and with it the addresses of the ranks that
    were before. On one machine the count of restarts tells them apart; on several each counts its own.
    """
    restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "USE_AGENT_STORE"))
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart-{restarts}", store)
    elif shared == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and rank == 0:
        warnings.warn(
            "restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun", stacklevel=2
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)


def spread(model, config, ranks: Ranks):
    """The model, checkpointed, compiled and spread over the ranks as the config says."""
    if config.checkpointing == "full":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
    if config.compile:
        _compile(model, whole=ranks.world == 1 and config.parallel == "ddp")
    if config.parallel == "fsdp":
        return _fsdp(model, config, ranks)
    if ranks.world == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = None if ranks.device == "cpu" else [torch.device(ranks.device)]
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def _compile(model, whole):
    """Compile a model as one graph or, on several ranks, block by block.

    One graph would give all gradients at its end, with nothing left to compute while they are on their way.
    """
    torch._dynamo.config.optimize_ddp = whole  # blocks are small enough for DDP as they are
    for module in [model] if whole else model.blocks:
        module.compile()


def _fsdp(model, config, ranks):
    """FSDP2 by blocks."""
    if not dist.is_initialized():
        raise TrainError("--parallel fsdp needs processes that torchrun starts, also if it is one")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # a block returns views, which nobody writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    pure = config.precision == "pure_bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if pure else MixedPrecisionPolicy()
    options = {"mesh": init_device_mesh(ranks.device.split(":")[0], (ranks.world,)), "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    # some versions of torch move uneven shards at first use: now, before others hold them
    for module in (*model.blocks, model):
        module.unshard()
        module.reshard()
    return model


def bare(model):
    """The DiT itself, whose calls FSDP2 still sees and DDP does not."""
    return model.module if hasattr(model, "module") else model


def syncing(model, last: bool):
    """For one pass of a step: gradients meet in the last."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    elif not last and hasattr(model, "no_sync"):
        return model.no_sync()
    return nullcontext()
