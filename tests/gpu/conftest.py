"""Tests at real sizes on a GPU; tiny sizes run anywhere, in the interpreter."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch):
    """Keep PyTorch's convolutions from rounding fp32 inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()
