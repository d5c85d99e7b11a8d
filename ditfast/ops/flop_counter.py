"""What PyTorch's FlopCounterMode counts for the registered operations: two per multiply-add of their matrix products.

Elementwise work counts nothing, and neither does what a backward computes again (attention's logits, the MLP's
activation): a forward and its backward count what plain PyTorch's formulas would.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

import torch

from ditfast.ops.op import Op
from ditfast.ops.registration import NAMESPACE

_COUNTER = "torch.utils.flop_counter"


def install(ops: tuple[Op, ...]) -> None:
    """Make the operations known to FlopCounterMode, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(ops, sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(ops))


def _register(ops, counter):
    for op in ops:
        for name, formula in op.flops.items():
            counter.register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas once the counter is imported: importing it for them would import triton."""

    def __init__(self, ops):
        self._ops = ops

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register(self._ops, module)

        spec.loader.exec_module = execute_and_register
        return spec
