"""The numerical contract itself: planted errors break it, PyTorch's own errors do not."""

import pytest
import torch

from ditfast.ops import contract

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=str)
def right(request):
    """low and ref; the second sample is much smaller than the first."""
    ref = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ref[1] *= 1e-3
    return ref.to(request.param), ref


def test_a_right_result_uses_half_of_its_budget(right):
    low, ref = right
    found = contract.verdict("out", low, low, ref)
    assert found["tensor"] == "out" and found["reason"] is None and found["used"] <= 0.5
    assert found["error"] == found["used"] * found["budget"]
    assert contract.violation(low, low, ref) is None


def test_a_wrong_element_is_named_by_its_maximum(right):
    low, ref = right
    wrong = low.clone()
    wrong[0, 1, 2] += 0.1
    found = contract.verdict("out", wrong, low, ref)
    assert found["reason"].startswith("out: max error: ") and found["used"] > 1
    assert contract.violation(wrong, low, ref) == found["reason"].removeprefix("out: ")


def test_a_wrong_sample_is_invisible_to_the_maximum_alone(right):
    low, ref = right
    wrong = low.clone()
    wrong[1] *= 1 + 8 * torch.finfo(low.dtype).eps
    assert "relative L2 error of sample 1" in contract.violation(wrong, low, ref)
    assert contract.violation(wrong, low, ref, per_sample=False) is None
    assert contract.verdict("out", wrong, low, ref, slack=0.2)["reason"] is None


def test_incomparable_results_are_wrong(right):
    low, ref = right
    broken = low.clone()
    broken[1, 2, 3] = float("nan")
    for got, reason in ((broken, "not finite"), (low[:1], "shape (1, 5, 7)"), (low.double(), "dtype torch.float64")):
        found = contract.verdict("out", got, low, ref)
        assert reason in found["reason"] and found["used"] is None
        assert contract.worst([found, contract.verdict("x", 2 * low, low, ref)]) == found
    assert "NaN" in contract.violation(low, broken, ref) and "NaN" in contract.violation(low, low, broken.double())


def test_zeros_have_no_relative_error(right):
    low, ref = (torch.zeros_like(t) for t in right)
    assert contract.verdict("out", low, low, ref)["used"] == 0
    least = low.clone()
    least[0, 0, 0] = torch.finfo(low.dtype).smallest_normal * torch.finfo(low.dtype).eps
    assert contract.violation(least, low, ref) is None
    assert "max error" in contract.violation(3 * least, low, ref)


def test_the_worst_verdict_is_a_broken_one():
    def entry(used, reason):
        return {"tensor": "", "error": used, "budget": 1.0, "used": used, "reason": reason}

    assert contract.worst([entry(0.2, None), entry(0.9, None), entry(0.5, None)])["used"] == 0.9
    assert contract.worst([entry(1.5, None), entry(1.1, "max error")])["used"] == 1.1
