"""The numerical contract of every kernel: as near to float64 as PyTorch itself in the same dtypes.

It is used by the self-check, the benchmarks and the tests.
"""

import torch

_EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def ulp(ref: torch.Tensor, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at the largest magnitude of ``ref``."""
    top = ref.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return (2.0 ** torch.floor(torch.log2(top)) * _EPS[dtype]).item()


def errors(got, low, ref, per_sample=True):
    """(kind, error, limit) of each rule, for ``got`` against the float64 reference.

    Args:
        got: what a kernel computed.
        low: what plain PyTorch computes in the dtypes of the kernel.
        ref: what plain PyTorch computes in float64.
        per_sample: whether the first dimension is the batch; if not, the tensor counts as one sample.

    The maximum error may be twice that of ``low`` plus 2 ulp at the largest magnitude. The relative L2 error of each
    sample may be twice that of ``low`` plus 1 ulp: the maximum alone would let a small systematic error pass.
    """
    got64, low64, eps = got.double(), low.double(), _EPS[got.dtype]
    limit = 2 * (low64 - ref).abs().max().item() + 2 * ulp(ref, got.dtype)
    yield "max error", (got64 - ref).abs().max().item(), limit
    samples = ref.shape[0] if per_sample and ref.dim() > 1 else 1
    got64, low64, ref = (t.reshape(samples, -1) for t in (got64, low64, ref))
    norm = ref.norm(dim=1).clamp(min=1e-30)
    error = ((got64 - ref).norm(dim=1) / norm).tolist()
    limit = (2 * (low64 - ref).norm(dim=1) / norm + eps).tolist()
    for i in range(samples):
        yield f"relative L2 error of sample {i}", error[i], limit[i]


def violation(got, low, ref, per_sample=True) -> str | None:
    """Why ``got`` breaks the contract; None if it keeps it. Arguments as in `errors`."""
    if got.shape != ref.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    if got.dtype != low.dtype:
        return f"dtype {got.dtype}, expected {low.dtype}"
    if ref.numel() == 0:
        return None
    if not torch.isfinite(got).all():
        return "not finite everywhere"
    for kind, error, limit in errors(got, low, ref, per_sample):
        if not error <= limit:
            return f"{kind}: {error:.3g} > {limit:.3g}"
    return None
