"""Diffusion Transformers on fused kernels. Importing this costs nothing: each name is loaded on first use."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # checkers cannot follow __getattr__; "as" re-exports a name
    from ditfast import checkpoints as checkpoints
    from ditfast import diffusion as diffusion
    from ditfast import flow as flow
    from ditfast import kernels as kernels  # type: ignore[attr-defined]  # where setup.py maps kernels/
    from ditfast import models as models
    from ditfast import ops as ops
    from ditfast.checkpoints import find_model as find_model
    from ditfast.diffusion import create_diffusion as create_diffusion
    from ditfast.flow import create_transport as create_transport
    from ditfast.heap import keep_freed_memory as keep_freed_memory
    from ditfast.models import AdaLNBlock as AdaLNBlock
    from ditfast.models import Attention as Attention
    from ditfast.models import CrossAttentionBlock as CrossAttentionBlock
    from ditfast.models import DiT as DiT
    from ditfast.models import DiT_B_2 as DiT_B_2
    from ditfast.models import DiT_B_4 as DiT_B_4
    from ditfast.models import DiT_B_8 as DiT_B_8
    from ditfast.models import DiT_L_2 as DiT_L_2
    from ditfast.models import DiT_L_4 as DiT_L_4
    from ditfast.models import DiT_L_8 as DiT_L_8
    from ditfast.models import DiT_models as DiT_models
    from ditfast.models import DiT_S_2 as DiT_S_2
    from ditfast.models import DiT_S_4 as DiT_S_4
    from ditfast.models import DiT_S_8 as DiT_S_8
    from ditfast.models import DiT_XL_2 as DiT_XL_2
    from ditfast.models import DiT_XL_4 as DiT_XL_4
    from ditfast.models import DiT_XL_8 as DiT_XL_8
    from ditfast.models import DiTBlock as DiTBlock
    from ditfast.models import FinalLayer as FinalLayer
    from ditfast.models import InContextBlock as InContextBlock
    from ditfast.models import LabelEmbedder as LabelEmbedder
    from ditfast.models import Mlp as Mlp
    from ditfast.models import PatchEmbed as PatchEmbed
    from ditfast.models import TimestepEmbedder as TimestepEmbedder
    from ditfast.models import get_1d_sincos_pos_embed_from_grid as get_1d_sincos_pos_embed_from_grid
    from ditfast.models import get_2d_sincos_pos_embed as get_2d_sincos_pos_embed
    from ditfast.models import get_2d_sincos_pos_embed_from_grid as get_2d_sincos_pos_embed_from_grid
    from ditfast.models import modulate as modulate
    from ditfast.models import packed_weights as packed_weights
    from ditfast.ops import use_backend as use_backend
    from ditfast.ops.verify import verify as verify

    _C: Any  # the extension, if it is built

_HOME = {
    **dict.fromkeys(
        ["DiT", "DiTBlock", "FinalLayer", "TimestepEmbedder", "LabelEmbedder", "PatchEmbed", "Attention", "Mlp"],
        "ditfast.models",
    ),
    **dict.fromkeys(["AdaLNBlock", "CrossAttentionBlock", "InContextBlock"], "ditfast.models"),
    **dict.fromkeys(["DiT_models", "modulate", "packed_weights"], "ditfast.models"),
    "get_1d_sincos_pos_embed_from_grid": "ditfast.models",
    "get_2d_sincos_pos_embed": "ditfast.models",
    "get_2d_sincos_pos_embed_from_grid": "ditfast.models",
    **{f"DiT_{size}_{patch}": "ditfast.models" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)},
    "create_diffusion": "ditfast.diffusion",
    "create_transport": "ditfast.flow",
    "find_model": "ditfast.checkpoints",
    "keep_freed_memory": "ditfast.heap",
    "use_backend": "ditfast.ops",
    "verify": "ditfast.ops.verify",
}
_SUBMODULES = ("checkpoints", "diffusion", "flow", "kernels", "models", "ops")

__all__ = ["__version__", *_HOME, *_SUBMODULES]


if find_spec("ditfast.kernels") is None:  # setup.py maps kernels/ there
    raise ImportError(
        f"ditfast is imported from its sources in {os.path.dirname(__path__[0])}, which hide an installed package: "
        "run Python in another directory, or install with pip install -e ."
    )


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _SUBMODULES:
        return import_module(f"ditfast.{name}")
    if name in _HOME:
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value
    from ditfast.suggest import did_you_mean

    hint = did_you_mean(name, __all__, cutoff=0.6)
    raise AttributeError(f"module 'ditfast' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
