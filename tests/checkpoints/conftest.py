from types import SimpleNamespace

import pytest
import torch

from ditfast.models import DiT

TINY = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=4, num_classes=5)
STEPS = torch.tensor([0, 10, 500, 999])


def random(model, seed=0):
    """Draw every weight at random, so that no gate is closed and no two weights are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=generator) * (0.5 if p.dim() < 2 else p[0].numel() ** -0.5))
    return model.eval()


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit():
    """A tiny model with random weights, a batch for it, and a bitwise comparison."""

    def tiny(seed=0, **changes):
        return random(DiT(**{**TINY, **changes}), seed)

    def batch(height=8, width=8):
        x = torch.randn(4, 4, height, width, generator=torch.Generator().manual_seed(1))
        return x, STEPS, torch.tensor([0, 3, 5, 1])

    def same(got, expected):
        got, expected = got.state_dict(), expected.state_dict()
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name

    return SimpleNamespace(tiny=tiny, batch=batch, same=same, random=random, TINY=TINY)
