"""How often a block passes over its stream outside Linears, attention and MLP: the table in docs/diffusers.md."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast.integrations.diffusers import patch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"
COUNTED = ("add", "div", "mul", "sum", "native_layer_norm", "layer_norm_modulate", "gated_residual")
N, TEXT, D = 16, 5, 16


class Passes(TorchDispatchMode):
    """Counts (B, N, D) tensors that norms, sums and elementwise operations read and write."""

    def __init__(self, tokens):
        super().__init__()
        self.shape, self.count = (3, tokens, D), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        if func.name().split("::")[1].startswith(COUNTED):
            self.count += sum(isinstance(t, torch.Tensor) and t.shape == self.shape for t in (*args, *outputs))
        return out


def count(block, call, tokens):
    """Passes over the token stream, forward and backward (to inputs and weights)."""
    x, text = torch.randn(3, N, D).requires_grad_(), torch.randn(3, TEXT, D).requires_grad_()
    leaves = [x, text, *block.parameters()]
    with Passes(tokens) as passes:
        out = call(block, x, text)
        out = out if isinstance(out, tuple) else (out,)
        forward = passes.count
        gradients = [torch.randn(t.shape) for t in out]
        torch.autograd.grad(out, leaves, gradients, allow_unused=True)
    return forward, passes.count - forward


def dit(block, x, text):
    return block(x, timestep=torch.tensor([1, 2, 3]), class_labels=torch.tensor([0, 1, 2]))


def pixart(block, x, text):
    return block(x, encoder_hidden_states=text, timestep=torch.randn(3, 6 * D))


def joint(block, x, text):
    return block(x, text, torch.randn(3, D))


@pytest.mark.parametrize(
    "row, name, path, call, tokens",
    [
        ("DiT", "dit", "transformer_blocks.0", dit, N),
        ("PixArt", "pixart", "transformer_blocks.0", pixart, N),
        ("SD3", "sd3", "transformer_blocks.1", joint, N),
        ("Flux, double", "flux", "transformer_blocks.0", joint, N),
        ("Flux, single", "flux", "single_transformer_blocks.0", joint, N + TEXT),
    ],
)
def test_passes_match_the_table(kit, row, name, path, call, tokens):
    model = kit.make(name)
    before = count(model.get_submodule(path), call, tokens)
    patch(model, backend="host")
    after = count(model.get_submodule(path), call, tokens)
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| {row} |")]
    assert f"| {before[0]} → {after[0]} | {before[1]} → {after[1]} |" in line, (before, after)
