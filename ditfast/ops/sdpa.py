"""PyTorch's scaled_dot_product_attention."""

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout: float = 0.0) -> Tensor:
    """Attention of q (B, H, N, d) over k and v (B, H, M, d): (B, H, N, d); supports forward-mode AD."""
    if forward_ad._current_level < 0:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):  # the only SDPA implementation with tangents
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


def sdpa_of_packed(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Self-attention of qkv (B, N, 3*H*d): (B, N, H*d)."""
    b, n, width = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, num_heads, width // (3 * num_heads))).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return sdpa(q, k, v, scale).transpose(1, 2).reshape(b, n, width // 3)
