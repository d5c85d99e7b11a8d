"""The Diffusion Transformer of Peebles & Xie, with the names, arguments and state dict of the original."""

from ditfast.models.blocks import Attention, DiTBlock, FinalLayer, Mlp
from ditfast.models.carry import Carry, modulate
from ditfast.models.conditioning import AdaLNBlock, CrossAttentionBlock, InContextBlock
from ditfast.models.dit import DiT
from ditfast.models.embed import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
)
from ditfast.models.packed import packed_weights
from ditfast.models.presets import (
    DiT_B_2,
    DiT_B_4,
    DiT_B_8,
    DiT_L_2,
    DiT_L_4,
    DiT_L_8,
    DiT_models,
    DiT_S_2,
    DiT_S_4,
    DiT_S_8,
    DiT_XL_2,
    DiT_XL_4,
    DiT_XL_8,
)

__all__ = [
    "AdaLNBlock",
    "Attention",
    "Carry",
    "CrossAttentionBlock",
    "DiT",
    "DiTBlock",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "DiT_models",
    "FinalLayer",
    "InContextBlock",
    "LabelEmbedder",
    "Mlp",
    "PatchEmbed",
    "TimestepEmbedder",
    "get_1d_sincos_pos_embed_from_grid",
    "get_2d_sincos_pos_embed",
    "get_2d_sincos_pos_embed_from_grid",
    "modulate",
    "packed_weights",
]
