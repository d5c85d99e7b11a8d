"""Weights packed for inference on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn as nn

from ditfast.models.blocks import Attention, DiTBlock, FinalLayer, Mlp
from ditfast.models.plain import is_plain
from ditfast.ops.gemm import packed

_LINEARS = {  # the Linears that run on packed weights, by owner
    Attention: ("qkv", "proj"),
    Mlp: ("fc1", "fc2"),
    DiTBlock: ("adaLN_modulation.1",),
    FinalLayer: ("adaLN_modulation.1",),
}


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Run the Linears of a model's blocks on weights packed for the CPU inside the ``with`` block.

    The packed copies take as much memory as the weights. They are created on entry, freed on exit and used only by
    the thread that enters. Weights are packed only where measurements showed a gain: bfloat16 with AVX512_BF16. A
    copy is ignored where it cannot replace the weight: with gradients or function transforms, under autocast to
    another dtype, for hooked, replaced or adapted Linears, and for a weight written to or replaced since. PyTorch
    does not count writes through ``.data``: after one, call ``torch.autograd.graph.increment_version(weight)``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with packed(_weights(model)):
        yield


def _weights(model):
    for owner in model.modules():
        for name in _LINEARS.get(type(owner), ()):
            parent, _, child = name.rpartition(".")
            linear = owner.get_submodule(parent)._modules.get(child)
            if linear is not None and is_plain(linear, nn.Linear):
                yield linear.weight
