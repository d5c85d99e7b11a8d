"""The numerical contract, and how a test runs one operation on several backends."""

import torch

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def leaf(t):
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def ulp(ref, dtype):
    """Spacing of ``dtype`` at the largest magnitude of ``ref``."""
    top = ref.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return (2.0 ** torch.floor(torch.log2(top)) * EPS[dtype]).item()


def assert_contract(name, got, low, ref, per_sample=True):
    """``got`` is as near to the float64 reference ``ref`` as ``low``, PyTorch's own result in the same dtypes.

    The maximum error: at most twice that of ``low`` plus 2 ulp at the largest magnitude. The relative L2 error of
    each sample: at most twice that of ``low`` plus 1 ulp; it catches what one large maximum would hide. A tensor
    whose first dimension is not the batch counts as one sample (``per_sample=False``).
    """
    assert got.shape == low.shape == ref.shape, f"{name}: shape {got.shape}, expected {ref.shape}"
    assert got.dtype == low.dtype, f"{name}: dtype {got.dtype}, expected {low.dtype}"
    if ref.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite everywhere"
    got64, low64 = got.double(), low.double()
    limit = 2 * (low64 - ref).abs().max().item() + 2 * ulp(ref, got.dtype)
    error = (got64 - ref).abs().max().item()
    assert error <= limit, f"{name}: max error {error:.3g} > {limit:.3g}"
    samples = ref.shape[0] if per_sample and ref.dim() > 1 else 1
    rows = (t.reshape(samples, -1) for t in (got64, low64, ref))
    for sample, (g, lo, r) in enumerate(zip(*rows, strict=True)):
        norm = r.norm().clamp(min=1e-30)
        error, limit = ((g - r).norm() / norm).item(), (2 * (lo - r).norm() / norm).item() + EPS[got.dtype]
        assert error <= limit, f"{name}: sample {sample}: relative L2 error {error:.3g} > {limit:.3g}"


def run(fn, inputs, weights):
    """Outputs of ``fn(*inputs)`` and the gradients of ``sum(output * weight)`` by every floating input."""
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
        names: of the outputs and then of the gradients.
        weights: gradients of the outputs.
        parameters: those of the names whose first dimension is not the batch.
    """
    got = run(lambda *a: op(*a, backend=backend), make_inputs(None), weights)
    low = run(lambda *a: op(*a, backend=low_backend), make_inputs(None), weights)
    ref = run(lambda *a: op(*a, backend=low_backend), make_inputs(torch.float64), [w.double() for w in weights])
    assert len(names) == len(got)
    for name, g, lo, r in zip(names, got, low, ref, strict=True):
        assert_contract(name, g, lo, r, per_sample=name not in parameters)
    return got
