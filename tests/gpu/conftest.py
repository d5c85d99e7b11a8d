"""Tests at real sizes on a GPU; their tiny sizes run anywhere, in the interpreter."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # problems and their verdicts are shared with it


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch):
    """PyTorch's own convolutions would round fp32 inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def free_memory():
    yield
    torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """The name of this folder counts as a keyword, but only the marker says what needs a GPU."""
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.own_markers = [m for m in item.own_markers if m.kwargs.get("reason") != "needs a CUDA GPU"]
