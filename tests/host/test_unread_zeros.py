"""Backward allocates no zeros for gradients that saved tensors cannot have."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import ops


class Zeros(TorchDispatchMode):
    """Records the shapes of all zeros that are allocated."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "zero" in function.__name__:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("op", "shapes"), ((ops.mlp, ((64, 16), (64,), (16, 64))), (ops.qkv_attention, ((48, 16), (48,))))
)
def test_no_zeros_are_allocated(op, shapes):
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 16), *shapes)]
    y = op(*tensors, *(() if op is ops.mlp else (2,)), backend="host")
    with Zeros() as zeros:
        torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert not zeros.shapes
