"""PyTorch's scaled_dot_product_attention."""

import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def sdpa(q, k, v, scale=None, dropout=0.0):
    """Attention of q (B, H, N, d) to k and v (B, H, M, d): (B, H, N, d), also with forward-mode AD."""
    if forward_ad._current_level < 0:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):  # the only one of its implementations that has tangents
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


def sdpa_of_packed(qkv, num_heads, scale):
    """Self-attention of qkv (B, N, 3*H*d): (B, N, H*d)."""
    b, n, width = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, num_heads, width // (3 * num_heads))).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return sdpa(q, k, v, scale).transpose(1, 2).reshape(b, n, width // 3)
