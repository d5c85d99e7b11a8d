"""Parallelization of a model over the processes of a run."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ditfast.models import DiT
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.config import Config
from ditfast.training.loss_step import LossStep

TIMEOUT = timedelta(minutes=30)  # upper bound on how far ranks drift apart: a checkpoint, a first compilation


def parallelize(step: LossStep, config: Config, ranks: Ranks) -> torch.nn.Module:
    """Apply activation checkpointing, torch.compile and DDP or FSDP2 to a step, as the config says.

    Raises:
        TrainError: a combination of options that cannot work.
    """
    model = step.model
    if config.checkpointing == "full":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block)
    if config.compile and config.objective == "meanflow":
        _compile_with_tangents(step, config)
    elif config.compile:
        _compile(model, whole=ranks.world == 1 and config.parallel == "ddp")
    if config.parallel == "fsdp":
        _shard(model, config, ranks)
    if config.parallel == "fsdp" or ranks.world == 1:
        return step
    from torch.nn.parallel import DistributedDataParallel

    devices = None if ranks.device == "cpu" else [torch.device(ranks.device)]
    return DistributedDataParallel(step, devices, gradient_as_bucket_view=True)


def _compile(model, whole):
    """Compile a model as one graph or, on several ranks, block by block.

    One graph would produce all gradients at its end, leaving no computation to overlap their communication with.
    """
    torch._dynamo.config.optimize_ddp = whole  # blocks are small enough for DDP as they are
    for module in [model] if whole else model.blocks:
        module.compile()


def _compile_with_tangents(step, config):
    """Compile the whole step: tangents cannot enter a model that is already compiled."""
    if config.parallel == "fsdp":
        raise TrainError("--compile with --objective meanflow needs --parallel ddp, got fsdp")
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph
    step.compile()


def _shard(model, config, ranks):
    """FSDP2 by blocks."""
    if not dist.is_initialized():
        raise TrainError("--parallel fsdp needs torchrun, even for a single process")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # blocks return views, which are never written to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    pure = config.precision == "pure_bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if pure else MixedPrecisionPolicy()
    options = {"mesh": init_device_mesh(ranks.device.split(":")[0], (ranks.world,)), "mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    # some torch versions reallocate uneven shards at first use: trigger it before anyone holds them
    for module in (*model.blocks, model):
        module.unshard()
        module.reshard()


def unwrap(step: Any) -> DiT:
    """The DiT in a step that `parallelize` returned; calling it bypasses DDP but not FSDP2."""
    return (step.module if hasattr(step, "module") else step).model


def gradient_sync(step: Any, last: bool) -> AbstractContextManager:
    """Context of one pass of a step: only the last one synchronizes gradients over the ranks."""
    model: Any = unwrap(step)  # FSDP2 adds methods
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    elif not last and hasattr(step, "no_sync"):
        return step.no_sync()
    return nullcontext()
