import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ditfast.models import DiT, modulate

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = dict(input_size=10, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=7)


def arr(name, shape, scale=1.0):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def fill(model):
    """Give every parameter the value that follows from its name (tests/golden/README.md)."""
    with torch.no_grad():
        for name, p in model.state_dict().items():
            matrix = p.dim() >= 2 and "embedding_table" not in name
            if name != "pos_embed":
                p.copy_(arr(name, tuple(p.shape), float(np.prod(p.shape[1:])) ** -0.5 if matrix else 0.1))
    return model


def original_block(block, x, c):
    """The original's sequence of operations: every submodule is called as a module."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
    attn, mlp = block.attn, block.mlp
    qkv = attn.qkv(modulate(block.norm1(x), shift_a, scale_a))
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v).transpose(1, 2).flatten(2)
    x = x + gate_a.unsqueeze(1) * attn.proj(out)
    h = modulate(block.norm2(x), shift_m, scale_m)
    return x + gate_m.unsqueeze(1) * mlp.fc2(mlp.act(mlp.fc1(h)))


def original(model, x, t, y):
    x = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, False)
    for block in model.blocks:
        x = original_block(block, x, c)
    final = model.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    return model.unpatchify(final.linear(modulate(final.norm_final(x), shift, scale)))


def gradients(model, out, *inputs):
    """Gradients of a generic scalar of ``out``, by name; those of ``inputs`` under their position."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad((out * arr("weights", tuple(out.shape))).sum(), (*inputs, *params))
    return dict(zip((*range(len(inputs)), *names), grads, strict=True))


def close(got, expected, rtol=1e-5):
    """Compare tensors, or dicts of them, relative to the largest value of each."""
    if not isinstance(expected, dict):
        got, expected = {"tensor": got}, {"tensor": expected}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        atol = rtol * value.abs().max().item() + 1e-9 if value.numel() else 0.0
        torch.testing.assert_close(got[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit():
    """The helpers above, a tiny model (25 tokens) and a batch of three different samples for it."""

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
