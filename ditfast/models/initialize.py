"""The initial parameters of a DiT."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from ditfast.models.embed import get_2d_sincos_pos_embed

if TYPE_CHECKING:
    from ditfast.models.dit import DiT


def initialize(model: "DiT") -> None:
    """Set every parameter: xavier-uniform projections, small normal embeddings, zero output.

    The Linears that regress modulation start at zero only in adaLN-Zero, where closed gates make each block the
    identity. Without gates, zeros would merely mute the conditioning.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block", and section 4, "Training".
    """
    model.apply(_xavier)
    if not model.pos_embed.is_meta:
        embed = get_2d_sincos_pos_embed(model.pos_embed.shape[-1], model.x_embedder.grid_size)  # (N, D)
        model.pos_embed.data.copy_(torch.from_numpy(embed).float().unsqueeze(0))
    projection = model.x_embedder.proj
    nn.init.xavier_uniform_(projection.weight.data.flatten(1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for embedder in filter(None, (model.t_embedder, model.r_embedder)):
        _small(embedder.mlp[0])
        _small(embedder.mlp[2])
    if model.conditioning == "adaln_zero":
        for layer in (*model.blocks, model.final_layer):
            _zero(layer.adaLN_modulation[-1])
    _zero(model.final_layer.linear)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _small(linear: Any) -> None:
    nn.init.normal_(linear.weight, std=0.02)


def _zero(linear: Any) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
