"""The eager baseline: a DiT's operations one by one in plain PyTorch, with SDPA for attention."""

import math

import torch
import torch.nn as nn

from harness.block.eager import EagerBlock, modulated_norm


class EagerTimestep(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class EagerFinal(nn.Module):
    def __init__(self, dim, outputs):
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale))


class EagerDiT(nn.Module):
    """A DiT with the parameter names of `ditfast.DiT`: (B, C, S, S), (B,), (B,) -> (B, 2*C, S, S)."""

    def __init__(self, model):
        super().__init__()
        d, p, c = model.pos_embed.shape[-1], model.patch_size, model.out_channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(model.in_channels, d, p, p)})
        self.t_embedder = EagerTimestep(d)
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(*model.y_embedder.embedding_table.weight.shape)}
        )
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed), requires_grad=False)
        self.blocks = nn.ModuleList([EagerBlock(d, model.num_heads) for _ in model.blocks])
        self.final_layer = EagerFinal(d, p * p * c)

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c)
        return self._image(self.final_layer(x, c))

    def _image(self, x):
        b, n, _ = x.shape
        side, p = math.isqrt(n), self.x_embedder.proj.kernel_size[0]
        return torch.einsum("nhwpqc->nchpwq", x.reshape(b, side, side, p, p, -1)).reshape(b, -1, side * p, side * p)
