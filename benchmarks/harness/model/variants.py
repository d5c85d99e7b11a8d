"""Variants: one model, with the same weights, executed in different ways."""

import importlib.util

import torch

from ditfast.checkpoints.convert import match_original, to_diffusers
from ditfast.models.meta import on_meta
from harness.block.variants import why_not as why_no_compiler
from harness.model.eager import EagerDiT

COMPILED = {  # arguments of torch.compile
    "compile": {},
    "compile-frozen": {"options": {"freezing": True}},
    "zentorch": {"backend": "zentorch"},
}
PATCHED = "ditfast+diffusers"  # diffusers' model, patched
VARIANTS = ("eager", "compile", "compile-frozen", "diffusers", "zentorch", "ditfast", "ditfast+compile", PATCHED)
_PACKAGES = {"diffusers": "diffusers", PATCHED: "diffusers", "zentorch": "zentorch"}
_INFERENCE = ("compile-frozen", "diffusers", "zentorch", PATCHED)  # diffusers keeps q, k and v apart


def why_not(variant: str, mode: str) -> str | None:
    """Why this machine cannot run ``variant``, or not in this mode; None if it can."""
    package = _PACKAGES.get(variant)
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if variant in _INFERENCE and mode == "train":
        return "it is measured in inference alone"
    return why_no_compiler("compile") if variant in COMPILED or variant.endswith("+compile") else None


def build(variant: str, model):
    """What ``variant`` names, on the parameters of ``model``, a `ditfast.DiT`: called as ``f(x, t, y)``."""
    if variant == "ditfast":
        return model
    if variant == "ditfast+compile":
        return torch.compile(model, fullgraph=True, dynamic=False)
    if variant in ("diffusers", PATCHED):
        return _diffusers(model, patched=variant == PATCHED)
    made = make_eager(model)
    if variant == "zentorch":
        importlib.import_module("zentorch")
    return torch.compile(made, fullgraph=True, dynamic=False, **COMPILED[variant]) if variant in COMPILED else made


def make_eager(model) -> EagerDiT:
    with torch.device("meta"):
        made = EagerDiT(model)
    made.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return made


class _Diffusers(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, t, y).sample


def _diffusers(model, patched):
    from diffusers import DiTTransformer2DModel

    from ditfast.integrations.diffusers import patch

    config, state = to_diffusers(model.config, model.state_dict())
    with on_meta():
        theirs = DiTTransformer2DModel(**config)
    theirs.load_state_dict(state, assign=True, strict=False)
    device = model.pos_embed.device
    theirs.pos_embed.pos_embed = model.pos_embed.detach().clone()  # a buffer outside the state dict
    match_original(theirs)
    if patched:
        patch(theirs)
    return _Diffusers(theirs.to(device).eval())
