"""GELU far from zero, and its tangent."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from contract import assert_contract  # noqa: E402

from ditfast.kernels import gelu  # noqa: E402

# the interpreter multiplies infinity by zero with numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_far_tails(dtype, device):
    """Derivative 0 on the left and 1 on the right, however far; NaN at infinity, as in PyTorch."""
    far = torch.tensor([[10.25, 15, 30, 6e4, 1e14, 1e20, 3e38, float("inf")]], device=device).to(dtype)
    pre = torch.cat([-far, far], dim=1)
    gradient = torch.full_like(pre, 2.0)
    act_of_pass, tangent = gelu.jvp(pre, gradient)
    act, dbias = gelu.backward_(gradient, pre, True, torch.float32)
    relu = pre.clamp(min=0).where(pre != -float("inf"), float("nan"))
    for t in (act, act_of_pass):
        torch.testing.assert_close(t, relu, atol=0, rtol=0, equal_nan=True)
    slope = (2.0 * (pre > 0)).where(pre.isfinite(), float("nan")).to(dtype)
    for t in (gradient, tangent, dbias[None].to(dtype)):
        torch.testing.assert_close(t, slope, atol=0, rtol=0, equal_nan=True)


def contiguous(t):
    return t


def strided(t):
    """The same values in rows that are 8 elements longer."""
    return torch.nn.functional.pad(t, (0, 8))[:, : t.shape[1]]


def expanded(t):
    """All rows equal the first, as in the tangent of a bias alone."""
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", (contiguous, strided, expanded))
def test_jvp(layout, dtype, device, poisoned):
    """Two blocks of rows and two of columns, the last ones partial."""
    g = torch.Generator().manual_seed(3)
    pre, pre_t = (torch.randn(7, 520, generator=g).mul(k).to(device, dtype) for k in (3, 1))
    pre_t = layout(pre_t)

    def plain(dtype):
        gelu_tanh = partial(torch.nn.functional.gelu, approximate="tanh")
        return torch.func.jvp(gelu_tanh, (pre.to(dtype),), (pre_t.to(dtype),))

    found = gelu.jvp(pre, pre_t), plain(dtype), plain(torch.float64)
    for name, got, low, ref in zip(("act", "act_t"), *found, strict=True):
        assert_contract(name, got, low, ref)
