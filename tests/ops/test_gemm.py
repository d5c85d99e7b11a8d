"""Linears by oneDNN: only for inputs it takes unchanged; everything else goes to `F.linear`, with its errors."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.ops import gemm
from ditfast.ops.backends import on_cpu


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    monkeypatch.setattr(on_cpu, "takes_onednn", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(on_cpu, "product_is_right", lambda *_: True)
    seen, onednn = [], gemm._onednn
    monkeypatch.setattr(gemm, "_onednn", lambda *args: seen.append(1) or onednn(*args))
    return seen


X, W, B = torch.randn(6, 8), torch.randn(10, 8), torch.randn(10)
TAKEN = {"plain": (X, W, B), "no bias": (X, W, None), "view": (X[2:], W[1:], B[1:])}
LEFT = {
    "strided tokens": (torch.randn(8, 6).t(), W, B),
    "strided weight": (X, torch.randn(8, 10).t(), B),
    "strided bias": (X, W, torch.randn(20)[::2]),
    "a bias for all": (X, W, B[:1]),
    "no rows": (X[:0], W, B),
}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("name", (*TAKEN, *LEFT))
def test_same_values(calls, name):
    arguments = (TAKEN | LEFT)[name]
    torch.testing.assert_close(gemm.linear(*arguments), F.linear(*arguments))
    assert bool(calls) == (name in TAKEN)


@pytest.mark.parametrize("change", ((X[:, :7], W, B), (X, W, B[:9]), (X, W.double(), B), (X, W, B.double())))
def test_unsuitable_inputs_go_to_f_linear(calls, change):
    with pytest.raises(RuntimeError):
        gemm.linear(*change)
    assert not calls


def test_a_reference_stays_plain(calls, monkeypatch):
    for backends in (("reference", "auto"), ("sdpa", "reference")):
        gemm.linear_with_autograd(X, W, B, backends)
    gemm.linear_with_autograd(X, W.clone().requires_grad_(), B, ("auto",))
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
        gemm.linear_with_autograd(X, W, B, ("auto",))
    assert not calls
    out = gemm.linear_with_autograd(X.view(2, 3, 8), W, B, ("sdpa", "auto"))
    torch.testing.assert_close(out, F.linear(X.view(2, 3, 8), W, B))
    assert calls
