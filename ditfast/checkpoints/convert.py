"""Convert between this package's weights and those of diffusers' DiTTransformer2DModel.

diffusers' model does not compute the original's function:

- its timestep frequencies end at exactly 1 / 10000 (``downscale_freq_shift=1``), which is not in its config;
- the LayerNorm before the MLP has eps 1e-5 instead of 1e-6, ``norm_eps`` in its config;
- every block has its own copy of the timestep and label embedders, the final layer uses block 0's;
- q, k and v are three Linears; the position embedding is not stored;
- there always is a null label, after the others.

`DiT` takes the first two as arguments, so conversion from diffusers is exact. The other direction is exact except for
the frequencies, which `match_original` sets on the new model.
"""

from typing import Any

import torch

from ditfast.checkpoints.differences import first_difference
from ditfast.checkpoints.infer import grid_of
from ditfast.checkpoints.position import is_sincos, sincos
from ditfast.models.dit import DiT
from ditfast.models.limits import check_arguments, whole
from ditfast.models.meta import on_meta

_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBED = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_ONLY = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}


def is_diffusers(config: dict) -> bool:
    """Whether this is the config of diffusers' model, under its current or former class name."""
    return config.get("_class_name") in ("DiTTransformer2DModel", "Transformer2DModel")


def from_diffusers(config: dict, state: dict) -> tuple[dict, dict]:
    """The arguments and weights of the `DiT` equivalent to diffusers' model.

    Raises:
        ValueError: an option that `DiT` lacks; a missing or unexpected weight; blocks whose embedders differ, after
            training in diffusers.
    """
    ours = config_from_diffusers(config)
    return ours, _state_from(dict(state), ours)


def config_from_diffusers(config: dict) -> dict:
    """The arguments of `from_diffusers`, without the weights."""
    for name, value in _ONLY.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} to convert from diffusers, got {config[name]!r}")
    for name, most in (("in_channels", 2**16), ("num_attention_heads", 2**17), ("attention_head_dim", 2**17)):
        whole(name, config.get(name, 1), 1, most)
    channels, depth = config.get("in_channels", 4), config.get("num_layers", 28)
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be in_channels={channels} or twice that, got {out_channels}")
    heads = config.get("num_attention_heads", 16)
    ours = {
        "input_size": config.get("sample_size", 32),
        "patch_size": config.get("patch_size", 2),
        "in_channels": channels,
        "hidden_size": heads * config.get("attention_head_dim", 72),
        "depth": depth,
        "num_heads": heads,
        "num_classes": config.get("num_embeds_ada_norm", 1000),
        "learn_sigma": out_channels == 2 * channels,
        "timestep_freq_shift": 1,
        "norm2_eps": config.get("norm_eps", 1e-5),
    }
    check_arguments(ours)
    return ours


def to_diffusers(config: dict, state: dict) -> tuple[dict, dict]:
    """The config and weights of diffusers' DiTTransformer2DModel, from ``model.config, model.state_dict()``.

    The copies of the embedders share memory. Call `match_original` on the new model, unless the config has
    ``timestep_freq_shift=1``. A model without a null label gets a row of zeros for it.

    Raises:
        ValueError: a model that diffusers cannot express: another conditioning, MLP or pos_embed, a
            rectangle, no blocks; weights that are not those of a `DiT` with this config.
    """
    with on_meta():
        built = DiT(**config).state_dict()
    if found := first_difference(state, built, "the weights", "a DiT with this config"):
        raise ValueError(f"the weights do not fit the config: {found}")
    table = state["y_embedder.embedding_table.weight"]
    size = config["input_size"] if isinstance(config["input_size"], int) else config["input_size"][0]
    expressible = {
        "conditioning": ("adaln_zero",),
        "mlp_ratio": (4,),
        "second_time": (False,),
        "input_size": (size, (size, size)),
        "depth": range(1, 1 + config["depth"]),  # the embedders are in the blocks
    }
    for name, values in expressible.items():
        if config[name] not in values:
            raise ValueError(f"diffusers cannot express {name}={config[name]!r}")
    if not is_sincos(state["pos_embed"], grid_of(config)):
        raise ValueError("diffusers cannot express a pos_embed other than sines and cosines")
    channels, heads = config["in_channels"], config["num_heads"]
    theirs = {
        "num_attention_heads": heads,
        "attention_head_dim": config["hidden_size"] // heads,
        "in_channels": channels,
        "out_channels": channels * (2 if config["learn_sigma"] else 1),
        "num_layers": config["depth"],
        "sample_size": size,
        "patch_size": config["patch_size"],
        "num_embeds_ada_norm": config["num_classes"],
        "norm_eps": config["norm2_eps"],
        **_ONLY,
    }
    if config["class_dropout_prob"] == 0:
        state = {**state, "y_embedder.embedding_table.weight": torch.cat([table, torch.zeros_like(table[:1])])}
    return theirs, _state_to(state, config["depth"])


def match_original(model: Any, timestep_freq_shift: float = 0, norm2_eps: float = 1e-6) -> None:
    """Make diffusers' model compute the original's function, or that of a `DiT` with these arguments, in place.

    diffusers does not store the changes: repeat this after its ``from_pretrained``.
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = timestep_freq_shift
        block.norm3.eps = norm2_eps


patch_diffusers = match_original  # its former name


def _names(depth):
    """Pairs of this package's and diffusers' names for weights that are the same tensor."""
    pairs = list(_ENDS.items())
    for i in range(depth):
        pairs += [(f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}") for ours, theirs in _BLOCK.items()]
    return [(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in pairs for kind in ("weight", "bias")]


def _state_to(state, depth):
    out = {theirs: state[ours] for ours, theirs in _names(depth)}
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        out |= {f"{block}norm1.emb.{theirs}": state[ours] for ours, theirs in _EMBED.items()}
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            out |= {f"{block}{name}.{kind}": part for name, part in zip(_QKV, parts, strict=True)}
    return out


def _state_from(left, config):
    """Pop the weights from ``left``, and return them under this package's names."""

    def take(name):
        if name not in left:
            raise ValueError(f"these are not the weights of diffusers' DiT: {name} is missing")
        return left.pop(name)

    out = {ours: take(theirs) for ours, theirs in _names(config["depth"])}
    for i in range(config["depth"]):
        block = f"transformer_blocks.{i}."
        for ours, theirs in _EMBED.items():
            value = take(f"{block}norm1.emb.{theirs}")
            if not torch.equal(out.setdefault(ours, value), value):
                raise ValueError(f"{block}norm1.emb.{theirs} differs from block 0's: a DiT shares one")
        for kind in ("weight", "bias"):
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([take(f"{block}{name}.{kind}") for name in _QKV])
    if left:
        raise ValueError(f"these are not the weights of diffusers' DiT: {min(left)} is unexpected")
    dtype = out["x_embedder.proj.weight"].dtype
    return {"pos_embed": sincos(config["hidden_size"], grid_of(config), dtype), **out}
