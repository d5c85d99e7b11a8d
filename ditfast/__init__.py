"""Diffusion Transformers on fused kernels. Importing this costs nothing: each name is loaded on first use."""

__version__ = "0.2.0"

_HOME = {
    **dict.fromkeys(
        ["DiT", "DiTBlock", "FinalLayer", "TimestepEmbedder", "LabelEmbedder", "PatchEmbed"], "ditfast.models"
    ),
    **dict.fromkeys(["AdaLNBlock", "CrossAttentionBlock", "InContextBlock"], "ditfast.models"),
    **dict.fromkeys(["DiT_models", "modulate", "get_2d_sincos_pos_embed", "packed_weights"], "ditfast.models"),
    **{f"DiT_{size}_{patch}": "ditfast.models" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)},
    "create_diffusion": "ditfast.diffusion",
    "create_transport": "ditfast.flow",
    "find_model": "ditfast.checkpoints",
    "use_backend": "ditfast.ops",
    "verify": "ditfast.ops.verify",
}
_SUBMODULES = ("checkpoints", "diffusion", "flow", "kernels", "models", "ops")

__all__ = ["__version__", *_HOME, *_SUBMODULES]


def __getattr__(name: str):
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f"ditfast.{name}")
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    from ditfast.suggest import did_you_mean

    hint = did_you_mean(name, __all__, cutoff=0.6)
    raise AttributeError(f"module 'ditfast' has no attribute {name!r}{hint}")


def __dir__():
    return sorted({*globals(), *__all__})
