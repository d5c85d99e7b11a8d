"""Forward-mode AD through a patched model of diffusers."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.integrations.diffusers import patch
from ditfast.ops import tangents


def tangents_of(kit, model, name):
    """The output and its tangent, and how many products of matrices (M, I), (I, O) they took."""
    arguments = kit.inputs(name)
    x, cpu = arguments.pop("hidden_states").detach(), torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profile, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        out = jvp(lambda x: model(hidden_states=x, **arguments).sample, (x,), (x.flip(0),))
    return out, sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("name, linears", (("dit", 2), ("pixart", 2), ("sd3", 1), ("flux", 4)))
def test_tangents_are_the_same_with_two_products_of_a_linear(kit, monkeypatch, name, linears):
    """PyTorch takes more. ``linears``: those of the model outside of operations, whose input has a tangent."""
    model = kit.make(name)
    expected, _ = tangents_of(kit, model, name)
    patch(model, backend="host")
    found, products = tangents_of(kit, model, name)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(tangents, "linear", F.linear)
    assert tangents_of(kit, model, name)[1] == products + 2 * linears
