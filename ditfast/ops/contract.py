"""The numerical contract of every kernel: as close to float64 as PyTorch itself in the same dtypes.

The self-check, the benchmarks and the tests all use it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def ulp(ref: Tensor, dtype: torch.dtype) -> float:
    """Spacing of ``dtype`` at the largest magnitude in ``ref``."""
    info = torch.finfo(dtype)
    top = ref.abs().max().clamp(min=info.tiny)
    return (2.0 ** torch.floor(torch.log2(top)) * info.eps).item()


def errors(
    got: Tensor, low: Tensor, ref: Tensor, per_sample: bool = True, slack: float = 0.0
) -> Iterator[tuple[str, float, float]]:
    """Yield (kind, error, limit) for each rule, for ``got`` against the float64 reference.

    The maximum error may be twice that of ``low`` plus 2 ulp at the largest magnitude. The relative L2 error of each
    sample may be twice that of ``low`` plus 1 ulp: the maximum alone would let a small systematic error pass.

    Args:
        got: the kernel's result.
        low: plain PyTorch's result in the kernel's dtypes.
        ref: plain PyTorch's result in float64.
        per_sample: whether the first dimension is the batch; if not, the tensor counts as one sample.
        slack: extra relative error allowed on top.
    """
    info = torch.finfo(got.dtype)
    got_error, low_error = got - ref, low - ref  # in float64, as ref is
    limit = 2 * _largest(low_error) + 2 * ulp(ref, got.dtype) + slack * _largest(ref)
    yield "max error", _largest(got_error), limit
    samples = ref.shape[0] if per_sample and ref.dim() > 1 else 1
    got_norm, low_norm, norm = (t.reshape(samples, -1).norm(dim=1) for t in (got_error, low_error, ref))
    norm = norm.clamp(min=info.tiny)  # below it the dtype has no relative precision
    error, limit = (got_norm / norm).tolist(), (2 * low_norm / norm + info.eps + slack).tolist()
    for i in range(samples):
        yield f"relative L2 error of sample {i}", error[i], limit[i]


def _largest(t) -> float:
    return torch.linalg.vector_norm(t, float("inf")).item()  # allocates no second tensor of this size


def verdict(tensor: str, got: Tensor, low: Tensor, ref: Tensor, per_sample: bool = True, slack: float = 0.0) -> dict:
    """Compare ``got`` with its budget by the tightest rule. Arguments as in `errors`.

    Returns:
        A dict: ``tensor``, the name; ``error``, ``budget`` and ``used``, the share of the budget, all None if there
        is nothing to compare; ``reason``, the first rule broken, or None.
    """
    error, budget, used, reason = _hold(got, low, ref, per_sample, slack)
    reason = None if reason is None else f"{tensor}: {reason}"
    return {"tensor": tensor, "error": error, "budget": budget, "used": used, "reason": reason}


def worst(verdicts: Iterable[dict]) -> dict:
    """The verdict that breaks the contract worst, else the one that uses most of its budget."""

    def badness(v):
        is_broken = v["reason"] is not None
        return is_broken, is_broken and v["used"] is None, v["used"] or 0.0

    return max(verdicts, key=badness)


def violation(got: Tensor, low: Tensor, ref: Tensor, per_sample: bool = True) -> str | None:
    """Why ``got`` breaks the contract; None if it holds. Arguments as in `errors`."""
    *_, reason = _hold(got, low, ref, per_sample)
    return reason


def _hold(got, low, ref, per_sample=True, slack=0.0):
    """(error, budget, share of the budget, why the contract is broken)."""
    reason = _incomparable(got, low, ref)
    if reason is not None or ref.numel() == 0:
        return None, None, None, reason
    rules = list(errors(got, low, ref, per_sample, slack))
    used, error, budget = max((error / limit, error, limit) for _, error, limit in rules)
    broken = (f"{kind}: {error:.3g} > {limit:.3g}" for kind, error, limit in rules if not error <= limit)
    return error, budget, used, next(broken, None)


def _incomparable(got, low, ref) -> str | None:
    if got.shape != ref.shape:
        return f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    if got.dtype != low.dtype:
        return f"dtype {got.dtype}, expected {low.dtype}"
    if not got.isfinite().all():
        return "not finite everywhere"
    return "NaN in plain PyTorch's result" if low.isnan().any() or ref.isnan().any() else None
