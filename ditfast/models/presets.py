"""The paper's twelve models by name: sizes S, B, L, XL (table 1), patches of 2, 4 and 8 latent pixels."""

from collections.abc import Callable
from typing import Any

from ditfast.models.dit import DiT
from ditfast.suggest import did_you_mean

SIZES: dict[str, dict[str, Any]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}


def _preset(size: str, patch_size: int) -> Callable[..., DiT]:
    def build(**kwargs: Any) -> DiT:
        return DiT(patch_size=patch_size, **SIZES[size], **kwargs)

    build.__name__ = build.__qualname__ = f"DiT_{size}_{patch_size}"
    build.__doc__ = f"DiT-{size}/{patch_size}; keyword arguments go to `DiT`."
    return build


DiT_XL_2, DiT_XL_4, DiT_XL_8 = _preset("XL", 2), _preset("XL", 4), _preset("XL", 8)
DiT_L_2, DiT_L_4, DiT_L_8 = _preset("L", 2), _preset("L", 4), _preset("L", 8)
DiT_B_2, DiT_B_4, DiT_B_8 = _preset("B", 2), _preset("B", 4), _preset("B", 8)
DiT_S_2, DiT_S_4, DiT_S_8 = _preset("S", 2), _preset("S", 4), _preset("S", 8)


class _Presets(dict):
    def __missing__(self, name):
        raise KeyError(f"model must be one of {', '.join(self)}, got {name!r}{did_you_mean(name, self)}")


DiT_models = _Presets(
    {
        "DiT-XL/2": DiT_XL_2,
        "DiT-XL/4": DiT_XL_4,
        "DiT-XL/8": DiT_XL_8,
        "DiT-L/2": DiT_L_2,
        "DiT-L/4": DiT_L_4,
        "DiT-L/8": DiT_L_8,
        "DiT-B/2": DiT_B_2,
        "DiT-B/4": DiT_B_4,
        "DiT-B/8": DiT_B_8,
        "DiT-S/2": DiT_S_2,
        "DiT-S/4": DiT_S_4,
        "DiT-S/8": DiT_S_8,
    }
)
