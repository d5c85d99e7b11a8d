"""The eager baseline: the block's operations one by one in plain PyTorch, with SDPA for attention."""

import torch.nn as nn
import torch.nn.functional as F


def modulated_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class EagerAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, h):
        b, n, d = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class EagerMlp(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class EagerBlock(nn.Module):
    """An adaLN-Zero block with the parameter names of `ditfast.DiTBlock`: (B, N, D), (B, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = EagerAttention(dim, num_heads)
        self.mlp = EagerMlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # (B, D) each
        x = x + gate_a.unsqueeze(1) * self.attn(modulated_norm(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulated_norm(x, shift_m, scale_m))
