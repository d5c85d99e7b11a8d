"""A copy of the model for sampling, with weights in the compute dtype."""

from copy import copy

import torch
import torch.nn as nn

from ditfast.models.blocks import DiTBlock, FinalLayer
from ditfast.models.carry import Carry, modulation, start_carry
from ditfast.models.dit import DiT
from ditfast.models.embed import LabelEmbedder, PatchEmbed, TimestepEmbedder
from ditfast.models.plain import is_known, is_plain
from ditfast.ops.backends.choice import names_in_force

_PARTS = {
    "x_embedder": PatchEmbed,
    "t_embedder": TimestepEmbedder,
    "y_embedder": LabelEmbedder,
    "final_layer": FinalLayer,
}
_GUIDED = DiT.forward_with_cfg
_READ_IN_AUTOCAST = (nn.Linear, nn.Conv2d)
_SETTINGS = (int, float, str, tuple, type(None))  # types of attributes that change a module's result


def why_not_plain(model: nn.Module) -> str | None:
    """Why a `DiT` with the same weights might not compute what ``model`` does; None if it would."""
    if not is_plain(model, DiT) or "forward_with_cfg" in vars(model) or DiT.forward_with_cfg is not _GUIDED:
        return "the model is not a DiT with its original forward, or has hooks"
    if model.conditioning != "adaln_zero":
        return f"its conditioning is {model.conditioning}"
    if model.r_embedder is not None:
        return "it takes a second time"
    if model.training:
        return "it is in training mode"
    for name, module in model.named_modules():
        known = is_known(module) or type(module) is nn.ModuleList
        kind = DiTBlock if name.startswith("blocks.") and name.count(".") == 1 else _PARTS.get(name, type(module))
        if not known or type(module) is not kind:
            return f"{name} was replaced or patched, or has hooks"
    return None


def store(model: DiT, dtype: torch.dtype) -> DiT:
    """A copy of the model that shares its tensors, except the float32 weights that autocast reads in ``dtype``."""
    return _store(model, dtype, {})


def _store(module, dtype, done):
    made = copy(module)
    made._parameters = module._parameters.copy()
    for name, p in module._parameters.items():
        if p is not None and id(p) not in done:
            casts = type(module) in _READ_IN_AUTOCAST and p.dtype == torch.float32
            done[id(p)] = nn.Parameter(p.detach().to(dtype) if casts else p.detach(), requires_grad=False)
        if p is not None:
            made._parameters[name] = done[id(p)]
    made._modules = {name: child and _store(child, dtype, done) for name, child in module._modules.items()}
    return made


def fingerprint(model: nn.Module) -> list:
    """A value that changes when a module or weight is replaced, a setting changes, or a weight is written in place.

    Writes through ``.data`` go unnoticed.
    """
    return [
        (
            id(module),
            {name: value for name, value in vars(module).items() if isinstance(value, _SETTINGS)},
            [(id(p), _version(p), p.data_ptr()) for p in module._parameters.values() if p is not None],
        )
        for module in model.modules()
    ]


def _version(p):
    return 0 if p.is_inference() else p._version


def run_stored(
    model: DiT,
    x: torch.Tensor,
    t: torch.Tensor,
    y: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    copies: int = 1,
) -> torch.Tensor:
    """The forward of a plain ``model`` on ``copies`` of latents x (B, C, S, S): (copies * B, C_out, S, S).

    Args:
        t, y: (copies * B,) timesteps and labels.
        rows: the output of `compute_rows` for them, concatenated; None to compute the modulation here.
    """
    backends = names_in_force(model.backend)
    tokens = model.embed_patches(x, backends)  # (B, N, D): the copies share their patches
    tokens = tokens if copies == 1 else tokens.repeat(copies, 1, 1)
    if rows is None:
        c = _embed_conditions(model, t, y, x.dtype)
        carry = start_carry(tokens, c, backends)
        for block in model.blocks:
            carry = block(carry, c)
        return model.unpatchify(model.final_layer(carry, c))
    *block_rows, last = rows.split(row_widths(model), dim=1)
    carry = Carry(tokens, None, None, None, None, backends)  # type: ignore[arg-type]  # rows replace silu_c
    for block, row in zip(model.blocks, block_rows, strict=True):
        carry = block.forward_rows(carry, row)  # type: ignore[operator]  # ModuleList has no element type
    return model.unpatchify(model.final_layer.forward_rows(carry, last))


def modulation_layers(model: DiT) -> list[nn.Module]:
    """The modules that compute the shifts, scales and gates of each block and of the final layer."""
    return [layer.adaLN_modulation for layer in (*model.blocks, model.final_layer)]


def row_widths(model: DiT) -> list[int]:
    """The output width of each of the `modulation_layers`."""
    return [parts * model.config["hidden_size"] for parts in (*[6] * len(model.blocks), 2)]


def _embed_conditions(model, t, y, dtype):
    return model.t_embedder(t, dtype=dtype) + model.y_embedder(y, False)  # (B, D)


def compute_rows(model: DiT, t: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Run the `modulation_layers` on timesteps and labels (B,): (B, 6*D) per block, (B, 2*D) for the final layer.

    Args:
        dtype: of the latents.
    """
    c = _embed_conditions(model, t, y, dtype)
    carry = start_carry(c[:, None], c, names_in_force(model.backend))  # its tokens are not read
    return [modulation(layer, c, carry) for layer in modulation_layers(model)]
