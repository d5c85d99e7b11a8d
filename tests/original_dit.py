"""The original's sequence of operations in plain PyTorch, on the weights of a `ditfast.DiT`."""

import torch.nn.functional as F

from ditfast.models import DiT, modulate


def original_block(block, x, c):
    """Every submodule is called as a module."""
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
    c = model.t_embedder(t) + model.y_embedder(y, model.training)
    for block in model.blocks:
        x = original_block(block, x, c)
    final = model.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    return model.unpatchify(final.linear(modulate(final.norm_final(x), shift, scale)))


class OriginalDiT(DiT):
    """A whole DiT computed this way."""

    def forward(self, x, t, y):
        return original(self, x, t, y)
