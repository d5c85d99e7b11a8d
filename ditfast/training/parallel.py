"""A model on all processes of a run."""

import warnings
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.loss_step import LossStep

TIMEOUT = timedelta(minutes=30)  # longer than any rank may be behind: a checkpoint, a first compilation


def parallelize(step: LossStep, config, ranks: Ranks):
    """The step, its model checkpointed, compiled and parallelized over the ranks as the config says."""
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

    One graph would give all gradients at its end, with nothing left to compute while they are on their way.
    """
    torch._dynamo.config.optimize_ddp = whole  # blocks are small enough for DDP as they are
    for module in [model] if whole else model.blocks:
        module.compile()


def _compile_with_tangents(step, config):
    """Compile the whole step: tangents do not enter what was compiled before."""
    if config.parallel == "fsdp":
        raise TrainError("--compile with --objective meanflow needs --parallel ddp, got fsdp")
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph
    step.compile()


def _shard(model, config, ranks):
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


def unwrap(step):
    """The DiT itself, whose calls FSDP2 still sees and DDP does not."""
    return (step.module if hasattr(step, "module") else step).model


def gradient_sync(step, last: bool):
    """The context of one pass of a step: gradients are summed over the ranks in the last."""
    if hasattr(unwrap(step), "set_requires_gradient_sync"):
        unwrap(step).set_requires_gradient_sync(last)
    elif not last and hasattr(step, "no_sync"):
        return step.no_sync()
    return nullcontext()
