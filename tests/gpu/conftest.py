"""Tests at real sizes on a GPU; their tiny sizes run anywhere, in the interpreter."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch):
    """PyTorch's own convolutions would round fp32 inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()
