"""The numerical contract, and how a test runs one operation on several backends."""

import torch

from ditfast.ops.contract import violation


def assert_contract(name, got, low, ref, per_sample=True):
    """``got`` is about as close to the float64 reference ``ref`` as ``low`` is: see `ditfast.ops.contract`."""
    reason = violation(got, low, ref, per_sample)
    assert reason is None, f"{name}: {reason}"


def run(fn, inputs, weights):
    """Outputs of ``fn(*inputs)``, and gradients of ``sum(output * weight)`` with respect to every floating input."""
    outputs = fn(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    grads = [w.to(o.dtype) if torch.is_tensor(w) else w for w, o in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    return [*outputs, *gradients]


def compare(op, make_inputs, *, names, weights, backend, low_backend="reference", parameters=()):
    """Hold ``op`` on ``backend`` to the contract: every output, every gradient.

    Args:
        make_inputs: (dtype or None) -> inputs; None for the dtypes under test, torch.float64 for the reference.
        names: names of the outputs, then of the gradients.
        weights: gradients of the outputs.
        parameters: the names whose first dimension is not the batch.
    """
    got = run(lambda *a: op(*a, backend=backend), make_inputs(None), weights)
    low = run(lambda *a: op(*a, backend=low_backend), make_inputs(None), weights)
    ref = run(lambda *a: op(*a, backend=low_backend), make_inputs(torch.float64), [w.double() for w in weights])
    assert len(names) == len(got)
    for name, g, lo, r in zip(names, got, low, ref, strict=True):
        assert_contract(name, g, lo, r, per_sample=name not in parameters)
    return got
