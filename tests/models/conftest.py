import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_values import GOLDEN, arr, close, fill
from original_dit import original, original_block

from ditfast.models import DiT

TINY = dict(input_size=10, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=7)


def gradients(model, out, *inputs):
    """Gradients of a generic scalar function of ``out``, by name; those of ``inputs`` by position."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad((out * arr("weights", tuple(out.shape))).sum(), (*inputs, *params))
    return dict(zip((*range(len(inputs)), *names), grads, strict=True))


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit():
    """The helpers above, a tiny model (25 tokens) and a batch of three different samples."""

    def tiny(**changes):
        return fill(DiT(**{**TINY, **changes})).eval()

    def batch(size=3):
        steps = torch.arange(size)
        return arr("x", (size, 4, 10, 10)), 999 - 250 * steps, (2 * steps + 1) % 8

    def golden(name):
        values = dict(np.load(GOLDEN / f"{name}.npz"))
        return {k: torch.from_numpy(v) if v.ndim else v for k, v in values.items()}

    return SimpleNamespace(
        tiny=tiny,
        batch=batch,
        golden=golden,
        json=lambda value: json.loads(str(value)),
        arr=arr,
        fill=fill,
        original=original,
        original_block=original_block,
        gradients=gradients,
        close=close,
    )
