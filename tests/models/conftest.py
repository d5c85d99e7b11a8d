import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_values import GOLDEN, arr, close, fill

from ditfast.models import DiT, modulate

TINY = dict(input_size=10, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=7)


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
