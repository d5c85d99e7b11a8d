"""FLOP formulas of the registered operations for PyTorch's FlopCounterMode: two per multiply-add of a matrix product.

Neither elementwise work nor recomputation in backward (attention's logits, the MLP's activation) counts: forward and
backward count the same as plain PyTorch's formulas.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

import torch

from ditfast.ops.op import Op
from ditfast.ops.registration import NAMESPACE

_COUNTER = "torch.utils.flop_counter"


def install(ops: tuple[Op, ...]) -> None:
    """Register the operations with FlopCounterMode, now or once it is imported."""
    if _COUNTER in sys.modules:
        _register(ops, sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(ops))


def _register(ops, counter):
    for op in ops:
        for name, formula in op.flops.items():
            counter.register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when the counter is imported; importing it here would import triton."""

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
