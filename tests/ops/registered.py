"""Valid arguments of the registered operations, as the public functions pass them."""

import pytest
import torch
from ops.test_bad_input import good
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import ops
from ditfast.ops.backends.availability import why_not


class Calls(TorchDispatchMode):
    """Records the registered operations that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ditfast":
            self.found[func] = args
        return func(*args, **(kwargs or {}))


def registered_calls(name, backend, batch=2):
    """operation -> arguments, for forward, backward, inference and tangents of a public function."""
    op = next(o for o in ops.ALL if o.name == name)
    if reason := why_not(op, backend, "cpu"):
        pytest.skip(reason)
    arguments = {
        k: _resized(a, batch) if isinstance(a, torch.Tensor) and k not in op.parameters else a
        for k, a in good(name).items()
    }
    tensors = {k: a for k, a in arguments.items() if isinstance(a, torch.Tensor)}

    def call(changed):
        out = op.function(**arguments | changed, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    with Calls() as calls:
        outputs = call({k: a.detach().requires_grad_() for k, a in tensors.items()})
        sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
        with torch.no_grad():
            call({})
            with forward_ad.dual_level():
                call({k: forward_ad.make_dual(a, torch.randn_like(a)) for k, a in tensors.items()})
    return {registered: tuple(map(_detached, args)) for registered, args in calls.found.items()}


def _resized(t, batch):
    return torch.randn(batch, *t.shape[1:], generator=torch.Generator().manual_seed(1)).to(t)


def _detached(a):
    return a.detach() if isinstance(a, torch.Tensor) else a


def available(name):
    """A kernel of this operation that runs here."""
    op = next(o for o in ops.ALL if o.name == name)
    return next((b for b in ("host", "triton") if why_not(op, b, "cpu") is None), "host")


def on_formulas(op, args):
    """The arguments for "reference": "host" keeps lse, of float32 here, in two parts."""
    names = [argument.name for argument in op._schema.arguments]
    args = [*args[:-1], "reference"]
    if "lse" in names and args[names.index("lse")].shape[1] == 4:  # of two heads
        largest, inverse = args[names.index("lse")].chunk(2, dim=1)
        args[names.index("lse")] = largest - inverse.log()
    return args
