"""Weights packed for inference on the CPU."""

from contextlib import contextmanager

import torch.nn as nn

from ditfast.models.blocks import Attention, DiTBlock, FinalLayer, Mlp
from ditfast.models.plain import is_plain
from ditfast.ops.gemm import packed

_LINEARS = {  # the Linears that run on packed weights, by their owner
    Attention: ("qkv", "proj"),
    Mlp: ("fc1", "fc2"),
    DiTBlock: ("adaLN_modulation.1",),
    FinalLayer: ("adaLN_modulation.1",),
}


@contextmanager
def packed_weights(model: nn.Module):
    """Run the Linears of a model's blocks on weights packed as the CPU reads them, inside the ``with`` block.

    The packed copies take as much memory as the weights. They are made on entry, freed on exit, and count in the
    thread that enters, where packing was measured to gain: bfloat16 on CPUs with AVX512_BF16. Elsewhere nothing is
    packed. They are passed over wherever they do not stand for the weight: with gradients or function transforms,
    under autocast to another dtype, for Linears that are hooked, replaced or adapted, and for a weight that was
    written to or replaced since. A write through ``.data`` goes unseen, as it does everywhere in PyTorch.

    Raises:
        TypeError: ``model`` is no module.
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
