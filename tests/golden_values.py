"""Deterministic values for models and inputs (tests/golden/README.md), and how close results must be."""

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def arr(name, shape, scale=1.0):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def fill(model):
    """Set every parameter to a value computed from its name."""
    with torch.no_grad():
        for name, p in model.state_dict().items():
            matrix = p.dim() >= 2 and "embedding_table" not in name
            if name != "pos_embed":
                p.copy_(arr(name, tuple(p.shape), float(np.prod(p.shape[1:])) ** -0.5 if matrix else 0.1))
    return model


def close(got, expected, rtol=1e-5):
    """Compare tensors, or dicts of them, relative to the largest value of each."""
    if not isinstance(expected, dict):
        got, expected = {"tensor": got}, {"tensor": expected}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * value.abs().max().item() + 1e-9 if value.numel() else 0.0
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
