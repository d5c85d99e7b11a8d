"""GELU's backward where float32 ends before GELU does."""

import pytest
import torch

pytest.importorskip("triton")

from ditfast.kernels import gelu  # noqa: E402

# the interpreter computes exp(large) with numpy, which warns; on a GPU it is inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_far_tails(dtype, device):
    """Gradient 0 on the left and 1 on the right, where exp(-z) leaves the range of float32."""
    pre = torch.tensor([[-6e4, -1000, -100, -40, -34.5, 34.5, 40, 100, 1000, 6e4]], dtype=dtype, device=device)
    gradient = torch.full_like(pre, 2.0)
    act, dbias = gelu.backward_(gradient, pre, True, torch.float32)
    expected = 2.0 * (pre > 0)
    torch.testing.assert_close(gradient, expected.to(dtype), atol=1e-20, rtol=0)
    torch.testing.assert_close(act, pre.clamp(min=0), atol=1e-20, rtol=0)
    torch.testing.assert_close(dbias, expected[0].float(), atol=1e-20, rtol=0)
